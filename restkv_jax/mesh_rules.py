"""Which mesh axis each logical axis is split over, and the shardings that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from restkv_jax.compression import CompressedLayer
from restkv_jax.layer import LayerInputs
from restkv_jax.protocols import LayerSpec
from restkv_jax.slots import LayerStack

Tree = TypeVar("Tree")
Result = TypeVar("Result")

# Logical axis -> mesh axis; logical axes that are not here are on every device.
AXES = (
    ("batch", "data"),
    ("kv_heads", "model"),
    ("query_heads", "model"),
    ("mlp", "model"),
    ("vocab", "model"),
)


@dataclasses.dataclass(frozen=True)
class MeshRules:
    """Which mesh axis each logical axis is split over; frozen and hashable, static under `jit`.

    Attributes:
        mesh: the devices; all its axes of type Auto.
        axes: pairs of a logical and a mesh axis, see `AXES`.
    """

    mesh: Mesh
    axes: tuple[tuple[str, str], ...] = AXES

    def __post_init__(self) -> None:
        """Refuses a table that does not fit the mesh.

        Raises:
            ValueError: naming the axis.
        """
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise ValueError(f"mesh: expected axes of type Auto, got {self.mesh.axis_types}")
        for logical, axis in self.axes:
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"axes: {logical!r} is split over {axis!r}, but the mesh has the axes "
                    f"{self.mesh.axis_names}"
                )
        if self.axis("kv_heads") != self.axis("query_heads"):
            raise ValueError("axes: expected kv_heads and query_heads on the same mesh axis")
        if self.axis("batch") is not None and self.axis("batch") == self.axis("kv_heads"):
            raise ValueError("axes: expected batch and heads on different mesh axes")

    @classmethod
    def over(cls, *, data: int = 1, model: int = 1) -> MeshRules:
        """The standard table on the first data x model devices.

        Raises:
            ValueError: there are fewer devices.
        """
        devices = jax.devices()[: data * model]
        if len(devices) < data * model:
            raise ValueError(f"data x model: {data} x {model}, but {len(devices)} devices")
        auto = (AxisType.Auto,) * 2
        return cls(jax.make_mesh((data, model), ("data", "model"), auto, devices=devices))

    def axis(self, logical: str | None) -> str | None:
        """The mesh axis of a logical one, None if it is not split."""
        return dict(self.axes).get(logical or "")

    def shards(self, logical: str) -> int:
        """In how many parts a logical axis is split."""
        axis = self.axis(logical)
        return 1 if axis is None else self.mesh.shape[axis]

    def spec(self, *logical: str | None) -> PartitionSpec:
        """Of an array whose first axes are these; None for axes that are not split."""
        return PartitionSpec(*map(self.axis, logical))

    def sharding(self, *logical: str | None) -> NamedSharding:
        """See `spec`."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def specs(self, tree: Tree) -> Tree:
        """`PartitionSpec`s in the place of a pytree's arrays.

        Args:
            tree: of caches, decode states, layer inputs, compressed layers or their shapes; any
                other array in it must lead with the batch.

        Raises:
            ValueError: a cache whose rows, heads or shared lists cannot be split evenly.
        """
        return jax.tree.map(self._specs, tree, is_leaf=lambda node: type(node) in _PARTS)

    def shardings(self, tree: Tree) -> Tree:
        """`NamedSharding`s in the place of a pytree's arrays, for `jax.device_put` or `jit`.

        Arguments and errors as of `specs`.
        """
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree))

    def on_shards(self, compute: Callable[..., Result], layer: LayerInputs, *rows: Array) -> Result:
        """What `score`, `select` or `compress` give, each device at its own rows and heads.

        Args:
            compute: of a layer and of arrays by row; everything it returns is [B, J, ...].
            layer: one layer's attention.
            rows: arrays that lead with the batch, such as budgets.

        Returns:
            `compute(layer, *rows)`, split by batch and heads.

        Raises:
            ValueError: batch or heads cannot be split evenly.
        """
        spec = self.split(layer.spec)
        self.require_rows(layer.k.shape[0])
        layer = dataclasses.replace(layer, index=jnp.asarray(layer.index, jnp.int32))

        def local(layer: LayerInputs, *rows: Array) -> Result:
            layer = dataclasses.replace(layer, spec=spec.share(layer.q.shape[1]))
            return compute(layer, *rows)

        specs = self.specs((layer, *rows))
        return self.on_devices(local, specs, self.spec("batch", "kv_heads"))(layer, *rows)

    def on_devices(self, compute: Callable[..., Any], inputs: object, outputs: object) -> Any:
        """`compute` on each device's own parts of its arguments.

        Without the check that what is on all devices of an axis is equal, see
        `restkv_jax.sharding`.

        Args:
            compute: of arrays.
            inputs: a tuple of `PartitionSpec`s for its arguments.
            outputs: those of its result.
        """
        return jax.shard_map(
            compute, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def split(self, spec: LayerSpec) -> LayerSpec:
        """The layer's, with the mesh axis that its heads are split over.

        Raises:
            ValueError: they cannot be split evenly.
        """
        shards = self.shards("kv_heads")
        if spec.num_kv_heads % shards:
            raise ValueError(
                f"mesh: {spec.num_kv_heads} key/value heads cannot be split over {shards} devices "
                f"of axis {self.axis('kv_heads')!r}; expected a multiple. Put more of the devices "
                "on the batch's axis instead"
            )
        axis = self.axis("kv_heads") if shards > 1 else None
        return dataclasses.replace(spec, head_axis=axis, head_shards=shards)

    def require_rows(self, batch: int) -> None:
        """Refuses a batch whose rows cannot be split evenly.

        Raises:
            ValueError: naming the numbers.
        """
        shards = self.shards("batch")
        if batch % shards:
            raise ValueError(
                f"batch: {batch} rows cannot be split over {shards} devices of axis "
                f"{self.axis('batch')!r}; expected a multiple"
            )

    def _require_sets(self, stack: LayerStack) -> None:
        shards, sets = self.shards("kv_heads"), stack.positions.shape[1]
        if sets % shards:
            what = "heads with slots of their own" if stack.owners is None else "lists of entries"
            raise ValueError(
                f"mesh: {sets} {what} in each layer of the cache cannot be split over {shards} "
                f"devices of axis {self.axis('kv_heads')!r}; expected a multiple. A cache keeps "
                "the number that it was made with: put more of the devices on the batch's axis"
            )

    def _specs(self, node: Any) -> Any:
        rows, heads = self.spec("batch"), self.spec("batch", "kv_heads")

        def each(spec: PartitionSpec, *parts: object) -> list[Any]:
            return [jax.tree.map(lambda _: spec, part) for part in parts]

        if isinstance(node, LayerStack):
            self.require_rows(node.positions.shape[0])
            self._require_sets(node)
            k, v, positions, owners, carried = each(
                heads, node.k, node.v, node.positions, node.owners, node.carried
            )
            (used,) = each(self.spec(None, "batch"), node.used)
            (queries,) = each(self.spec(None, "batch", "query_heads"), node.queries)
            return dataclasses.replace(
                node,
                k=k,
                v=v,
                positions=positions,
                owners=owners,
                carried=carried,
                used=used,
                queries=queries,
            )
        if isinstance(node, LayerInputs):
            weights = self.spec("query_heads")
            of = {"factor": weights, "w_o": weights, "lengths": rows, "index": self.spec()}
            names = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
            parts = {name: each(of.get(name, heads), getattr(node, name))[0] for name in names}
            return dataclasses.replace(node, **parts)
        if isinstance(node, CompressedLayer):
            return jax.tree.map(lambda _: heads, node)
        return rows


_PARTS = (LayerStack, LayerInputs, CompressedLayer)
