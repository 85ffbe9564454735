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
others called inside of it. On TPU say `check_vma=False` there: JAX's splash attention does not pass
that check, and with it prompts are attended to in plain XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, DTypeLike, Float, Int

from restkv_jax.mesh_rules import MeshRules
from restkv_jax.protocols import Attend, CausalLM, LayerSpec, Projection, State
from restkv_jax.slots import LayerStack


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
        return tuple(map(self.rules.split, self.model.layer_specs))

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
        rules.require_rows(tokens.shape[0])
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
                run = rules.on_devices(functools.partial(local, layer), inputs, (by_head, specs))
                return run(q, k, v, w_o, state)
            run = rules.on_devices(local, (rules.spec(), *inputs), (by_head, specs))
            return run(layer, q, k, v, w_o, state)

        tokens, positions = jax.lax.with_sharding_constraint((tokens, positions), by_row)
        hidden, state = self.model(tokens, positions, on_shards, state)
        return jax.lax.with_sharding_constraint(hidden, by_row), state

    def on_shards(
        self,
        compute: Callable[[State, tuple[Any, ...]], State],
        state: State,
        weights: tuple[Any, ...],
    ) -> State:
        """`compute(state, weights)` on each device's own rows and heads.

        Args:
            compute: as `attend`, it may close over static values only.
            state: caches, and arrays that lead with the batch.
            weights: arrays that lead with the query heads.
        """
        specs, shards = self.rules.specs(state), self.rules.shards("kv_heads")

        def local(state: State, weights: tuple[Any, ...]) -> State:
            state = compute(_with_heads(state, lambda n: n // shards), weights)
            return _with_heads(state, lambda n: n * shards)

        inputs = specs, self.rules.spec("query_heads")
        return self.rules.on_devices(local, inputs, specs)(state, weights)

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
