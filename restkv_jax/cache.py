"""The key/value cache: a pytree of fixed shape whose empty slots are marked by position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from restkv_jax.compression import CompressedLayer
from restkv_jax.plan import CachePlan
from restkv_jax.protocols import LayerSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerStack:
    """K/V of all layers that have the same shape, stacked.

    One array for many layers is what XLA updates in place inside a loop; a list of per-layer
    arrays is copied at every step on CPU.

    Attributes:
        k: [L, B, J, S, H] keys, stored after rotary embedding; J heads, K or N of them.
        v: [L, B, J, S, H] values.
        positions: int32 [L, B, J, S] true position of each entry, -1 for an empty slot.
        used: int32 [B] the slot that the next token of each row is written to, modulo S in a
            ring.
        ring: static; the layers have a sliding window, and what leaves it is written over.
    """

    k: Float[Array, "L B J S H"]
    v: Float[Array, "L B J S H"]
    positions: Int[Array, "L B J S"]
    used: Int[Array, " B"]
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def slots(self) -> int:
        """S, slots of each head."""
        return self.k.shape[3]

    def visible(
        self, row: int | Array, query: Int[Array, " B"], spec: LayerSpec
    ) -> Bool[Array, "B J S"]:
        """True for the slots of one layer that a query at position `query` may look at."""
        positions = self.positions[row]
        seen = positions >= 0
        if spec.window is not None:
            seen &= query[:, None, None] - positions < spec.window
        return seen

    def fill(self, row: int | Array, layer: CompressedLayer) -> LayerStack:
        """Puts what a layer keeps of its prompt into the first slots of its row."""

        def put(whole: Array, part: Array) -> Array:
            start = (row, *(0,) * part.ndim)
            return jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), start)

        return dataclasses.replace(
            self,
            k=put(self.k, layer.k),
            v=put(self.v, layer.v),
            positions=put(self.positions, layer.positions),
        )

    def append(
        self,
        row: int | Array,
        k: Float[Array, "B J H"],
        v: Float[Array, "B J H"],
        position: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> LayerStack:
        """Writes one token of one layer at the cursor, which does not move yet (see `advance`).

        Inactive rows keep what they hold.
        """
        batch = jnp.arange(self.used.shape[0])
        slot = self.used % self.slots if self.ring else self.used
        slot = jnp.where(active, slot, self.slots)  # out of bounds: dropped

        def put(whole: Array, part: Array) -> Array:
            part = part.astype(whole.dtype)
            return whole.at[row, batch, :, slot].set(part, mode="drop", unique_indices=True)

        marked = jnp.broadcast_to(position[:, None], (batch.size, self.k.shape[2]))
        return dataclasses.replace(
            self, k=put(self.k, k), v=put(self.v, v), positions=put(self.positions, marked)
        )

    def advance(self, active: Bool[Array, " B"]) -> LayerStack:
        """Moves the cursor of active rows past the token that all layers have appended."""
        return dataclasses.replace(self, used=self.used + active)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """The cache of a whole model.

    Attributes:
        stacks: layers grouped by shape.
        next_position: int32 [B] true position of the next token; it counts the whole prompt,
            whatever was evicted.
        rows: static; for each layer its stack and its row in the stack.
    """

    stacks: tuple[LayerStack, ...]
    next_position: Int[Array, " B"]
    rows: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, empty slots included."""
        return sum(_bytes(stack.k) + _bytes(stack.v) for stack in self.stacks)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything: keys, values, positions and cursors."""
        return sum(_bytes(leaf) for leaf in jax.tree.leaves(self))

    def place(self, layer: int | Array) -> tuple[int, int | Array]:
        """A layer's stack and its row there. A traced index needs all layers in one stack.

        Raises:
            ValueError: a traced index, but layers of several shapes or kinds.
        """
        if isinstance(layer, int):
            return self.rows[layer]
        if len(self.stacks) > 1:
            raise ValueError(
                "layer: a traced index needs layers of one shape; unroll the loop over layers"
            )
        return 0, layer

    def with_stack(self, index: int, stack: LayerStack) -> KVCache:
        """This cache with one stack exchanged."""
        stacks = (*self.stacks[:index], stack, *self.stacks[index + 1 :])
        return dataclasses.replace(self, stacks=stacks)

    def kept_positions(self, layer: int) -> Int[Array, "B J S"]:
        """Positions held by a layer's heads, -1 for empty slots."""
        stack, row = self.rows[layer]
        return self.stacks[stack].positions[row]


def init_cache(
    specs: tuple[LayerSpec, ...],
    plan: CachePlan,
    *,
    batch: int,
    prompt_columns: int,
    dtype: DTypeLike,
) -> KVCache:
    """An empty cache. Only `full` and ratio budgets make its size depend on the prompt.

    Layers with a sliding window are ring buffers in stacks of their own, see
    `CachePlan.for_layer`.

    Args:
        specs: the model's layers.
        plan: policy, budget and headroom.
        batch: B.
        prompt_columns: columns that the prompt is padded to.
        dtype: of keys and values.
    """
    kinds = []
    for layer, spec in enumerate(specs):
        own = plan.for_layer(spec, prompt_columns)
        heads = own.policy.cache_heads(spec.num_heads, spec.num_kv_heads)
        slots = own.prompt_slots(prompt_columns, layer, len(specs)) + own.headroom
        kinds.append((spec.window is not None, heads, slots, spec.head_dim))
    distinct = list(dict.fromkeys(kinds))
    rows, seen = [], dict.fromkeys(distinct, 0)
    for kind in kinds:
        rows.append((distinct.index(kind), seen[kind]))
        seen[kind] += 1
    stacks = []
    for kind in distinct:
        ring, *shape = kind
        whole = (seen[kind], batch, *shape)
        stacks.append(
            LayerStack(
                k=jnp.zeros(whole, dtype),
                v=jnp.zeros(whole, dtype),
                positions=jnp.full(whole[:-1], -1, jnp.int32),
                used=jnp.zeros(batch, jnp.int32),
                ring=ring,
            )
        )
    return KVCache(
        stacks=tuple(stacks), next_position=jnp.zeros(batch, jnp.int32), rows=tuple(rows)
    )


def _bytes(x: Array) -> int:
    return x.size * x.dtype.itemsize  # of a `ShapeDtypeStruct` too, unlike `nbytes`
