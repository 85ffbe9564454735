"""Several devices: rows of the batch on one mesh axis, heads on the other.

One table says which mesh axis each logical axis is split over, and every sharding follows from it:
of weights (`models.sharding`), caches, decode state, scores. `ShardedLM` runs what `prefill`,
`decode_chunk` and the others do in a layer on each device's own rows and heads, so that attention,
scoring, selection and compaction need no communication at all. What is left to XLA's partitioner
is the network around it.

The rules:

* Key/value heads must be a multiple of the devices that they are split over. Fewer heads than
  devices are refused rather than copied: put the batch on those devices instead.
* A policy whose scores need all heads of a layer exchanges one small array: TOVA averages its
  weights [B, T] in one all-reduce for each layer, at every eviction.
* Heads with budgets of their own share lists of entries, and a device holds whole lists: deal the
  heads out to a multiple of the devices (`AdaKV(lists=...)`). They compete within their list, on
  one device as on many, and nothing is exchanged. One list over several devices is refused: their
  shares of it would be unequal, and not known before the scores are.

Rows may also be split by a `jax.shard_map` of one's own, with `prefill`, `decode_chunk` and the
others called inside of it. It has to say `check_vma=False`: loops here start from constants, which
that check takes for arrays that are equal on all devices, and refuses by a TypeError about a carry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from restkv_jax.compression import CompressedLayer
from restkv_jax.layer import LayerInputs
from restkv_jax.protocols import Attend, CausalLM, LayerSpec, Projection, State
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
        spec = self._split(layer.spec)
        self._require_rows(layer.k.shape[0])
        layer = dataclasses.replace(layer, index=jnp.asarray(layer.index, jnp.int32))

        def local(layer: LayerInputs, *rows: Array) -> Result:
            layer = dataclasses.replace(layer, spec=spec.share(layer.q.shape[1]))
            return compute(layer, *rows)

        specs = self.specs((layer, *rows))
        return self._map(local, specs, self.spec("batch", "kv_heads"))(layer, *rows)

    def _map(self, compute: Callable[..., Any], inputs: object, outputs: object) -> Any:
        # What is on all devices of an axis is not checked to be equal, see the module's text.
        return jax.shard_map(
            compute, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def _split(self, spec: LayerSpec) -> LayerSpec:
        shards = self.shards("kv_heads")
        if spec.num_kv_heads % shards:
            raise ValueError(
                f"mesh: {spec.num_kv_heads} key/value heads cannot be split over {shards} devices "
                f"of axis {self.axis('kv_heads')!r}; expected a multiple. Put more of the devices "
                "on the batch's axis instead"
            )
        axis = self.axis("kv_heads") if shards > 1 else None
        return dataclasses.replace(spec, head_axis=axis, head_shards=shards)

    def _require_rows(self, batch: int) -> None:
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
            self._require_rows(node.positions.shape[0])
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedLM:
    """A `CausalLM` whose calls of `attend` run on each device's own rows and heads.

    It goes wherever the model does: `prefill`, `decode_chunk`, `extend`, `generate`, and gives
    what one device gives. Make it with `shard`.

    Attributes:
        model: the model, its weights placed (see `models.sharding`), or a `FactoredLM` of it.
        rules: static.
    """

    model: CausalLM
    rules: MeshRules = dataclasses.field(metadata={"static": True})

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The model's, with the mesh axis that the heads are split over.

        Raises:
            ValueError: the heads cannot be split evenly.
        """
        return tuple(map(self.rules._split, self.model.layer_specs))

    @property
    def kv_dtype(self) -> DTypeLike:
        """The model's."""
        return self.model.kv_dtype

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Runs the model; see `CausalLM`.

        Args:
            tokens: token ids.
            positions: of the tokens.
            attend: sees this device's rows and heads, and nothing else by way of arrays: it may
                close over static values only.
            state: caches, and arrays that lead with the batch.

        Raises:
            ValueError: the rows cannot be split evenly.
        """
        rules = self.rules
        rules._require_rows(tokens.shape[0])
        by_row = rules.sharding("batch")
        by_head = rules.spec("batch", None, "query_heads")

        def on_shards(
            layer: int | Array, q: Array, k: Array, v: Array, w_o: Array | Projection, state: State
        ) -> tuple[Array, State]:
            specs = rules.specs(state)
            inputs = (by_head, by_head, by_head, rules.spec("query_heads"), specs)
            shards = rules.shards("kv_heads")

            def local(
                layer: int | Array, q: Array, k: Array, v: Array, w_o: Any, state: State
            ) -> tuple[Array, State]:
                out, state = attend(layer, q, k, v, w_o, _with_heads(state, lambda n: n // shards))
                return out, _with_heads(state, lambda n: n * shards)

            if isinstance(layer, int):
                run = rules._map(functools.partial(local, layer), inputs, (by_head, specs))
                return run(q, k, v, w_o, state)
            run = rules._map(local, (rules.spec(), *inputs), (by_head, specs))
            return run(layer, q, k, v, w_o, state)

        tokens, positions = jax.lax.with_sharding_constraint((tokens, positions), by_row)
        hidden, state = self.model(tokens, positions, on_shards, state)
        return jax.lax.with_sharding_constraint(hidden, by_row), state

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The model's."""
        return self.model.unembed(hidden)


def shard(model: CausalLM, rules: MeshRules) -> ShardedLM:
    """A model on a mesh.

    Args:
        model: its weights are left where they are; XLA moves those at each call that are not
            where the table says, so place them first, see `models.sharding`.
        rules: the mesh and its table.

    Raises:
        ValueError: the model's heads cannot be split evenly.
    """
    sharded = ShardedLM(model=model, rules=rules)
    _ = sharded.layer_specs
    return sharded


def _with_heads(state: State, change: Callable[[int], int]) -> State:
    """The static number of heads in every stack, changed to the device's own and back."""

    def of(node: Any) -> Any:
        if isinstance(node, LayerStack):
            return dataclasses.replace(node, heads=change(node.heads))
        return node

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, LayerStack))
