"""Slots of the cache's layers: one array for many layers, written and evicted in place."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bits import move
from pallas_kernels.decode_attention import NewEntry, decode_attention
from pallas_kernels.quantized import QuantArray, quantize
from pallas_kernels.slot_write import write_slots
from restkv_jax.compression import CompressedLayer
from restkv_jax.protocols import LayerSpec


class LayerSlots(NamedTuple):
    """One layer's part of a `LayerStack`, with the same letters."""

    k: Float[Array, "B J S H"] | QuantArray
    v: Float[Array, "B J S H"] | QuantArray
    positions: Int[Array, "B J S"]
    owners: Int[Array, "B J S"] | None
    carried: Float[Array, "B N S"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerStack:
    """K/V of many layers, one after another along the axis of slots.

    One array for many layers is what XLA updates in place inside a loop; a list of per-layer
    arrays is copied at every step on CPU. Layers may have different numbers of slots. S is the
    sum of them, J the sets of entries of a layer: K, or N by the policy's granularity, or the
    number of lists if heads share lists because each has a budget of its own.

    Attributes:
        k: [B, J, S, H] keys, stored after rotary embedding.
        v: [B, J, S, H] values.
        positions: int32 [B, J, S] true position of each entry, -1 for an empty slot.
        used: int32 [L, B] the slot of each layer that its next token is written to, modulo the
            layer's slots in a ring.
        sizes: static; slots of each layer.
        heads: static; heads that keep a set of their own, also if they share lists.
        ring: static; the layers have a sliding window, and what leaves it is written over.
        owners: int32 [B, J, S] which of a shared list's heads each entry belongs to, or None.
        queries: [L, B, N, W + 1, H] the newest query and the W before it, at their positions
            modulo W + 1; or None.
        carried: float32 [B, N, S] what the policy handed on at the last eviction, -1 for entries
            that came later; or None.
        accumulates: static; `carried` is the attention that each entry has received so far.
    """

    k: Float[Array, "B J S H"] | QuantArray
    v: Float[Array, "B J S H"] | QuantArray
    positions: Int[Array, "B J S"]
    used: Int[Array, "L B"]
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    heads: int = dataclasses.field(metadata={"static": True})
    ring: bool = dataclasses.field(default=False, metadata={"static": True})
    owners: Int[Array, "B J S"] | None = None
    queries: Float[Array, "L B N W1 H"] | None = None
    carried: Float[Array, "B N S"] | None = None
    accumulates: bool = dataclasses.field(default=False, metadata={"static": True})

    def start(self, row: int | Array) -> int | Array:
        """Where a layer's slots begin. A traced row needs layers of one size."""
        return sum(self.sizes[:row]) if isinstance(row, int) else row * self.size(row)

    def start_multiple(self, row: int | Array) -> int:
        """A static number that divides where a layer's slots begin."""
        return 1 if isinstance(row, int) else self.size(row)

    def size(self, row: int | Array) -> int:
        """Slots of a layer.

        Raises:
            ValueError: a traced row, but layers of several sizes.
        """
        if isinstance(row, int):
            return self.sizes[row]
        if len(set(self.sizes)) > 1:
            raise ValueError(
                "layer: a traced index needs layers of one size; unroll the loop over layers"
            )
        return self.sizes[0]

    def layer(self, row: int | Array) -> LayerSlots:
        """One layer's slots."""
        start, size = self.start(row), self.size(row)

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)

        return jax.tree.map(part, self._slots())

    def with_layer(self, row: int | Array, layer: LayerSlots) -> LayerStack:
        """This stack with one layer's first slots exchanged, as many as `layer` has."""
        start = self.start(row)

        def write(whole: Array, part: Array, start: int | Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=2)

        def put(whole: Array, part: Array) -> Array:
            return move(write, whole, part.astype(whole.dtype), at=start)

        return dataclasses.replace(self, **jax.tree.map(put, self._slots(), layer)._asdict())

    def fill(self, row: int | Array, kept: CompressedLayer) -> LayerStack:
        """Puts what a layer keeps of its prompt into its first slots, the cursor behind it."""
        layer = LayerSlots(
            k=_stored(kept.k, self.k),
            v=_stored(kept.v, self.v),
            positions=kept.positions,
            owners=kept.owners,
            carried=kept.carried if self.carried is not None else None,
        )
        entries = jnp.max(jnp.sum(kept.positions >= 0, axis=-1), axis=-1)
        if kept.owners is not None:
            # Lists may be filled unequally: new tokens start behind the longest that can be.
            entries = jnp.full_like(entries, kept.positions.shape[-1])
        return dataclasses.replace(
            self.with_layer(row, layer), used=self.used.at[row].set(entries.astype(jnp.int32))
        )

    @property
    def heads_per_list(self) -> int:
        """How many heads share a list of entries, 1 if each has its own."""
        return 1 if self.owners is None else self.heads // self.owners.shape[1]

    def append(
        self,
        row: int | Array,
        k: Float[Array, "B T J H"],
        v: Float[Array, "B T J H"],
        positions: Int[Array, "B T"],
    ) -> LayerStack:
        """Writes tokens of one layer at its cursor, which `advance` moves.

        Args:
            row: the layer's row.
            k: keys of every head.
            v: values.
            positions: of the tokens, ascending; negative ones are left out. What finds no slot
                is lost, in a ring all but the last of them.
        """
        batch, tokens = positions.shape
        lists, per_token = self.positions.shape[1], self.heads_per_list
        slot, marked, owners = self._places(row, positions), positions, None
        if self.owners is not None:
            marked = jnp.repeat(positions, per_token, axis=1)
            k, v = (
                x.reshape(batch, tokens, lists, per_token, -1)
                .swapaxes(2, 3)
                .reshape(batch, tokens * per_token, lists, -1)
                for x in (k, v)
            )
            each = jnp.tile(jnp.arange(per_token), tokens)[:, None]
            owners = jnp.broadcast_to(each, (*slot.shape, lists))
        marked = jnp.broadcast_to(marked[..., None], (*slot.shape, lists))
        entries = LayerSlots(
            _stored(k, self.k), _stored(v, self.v), marked, owners, self._not_carried(slot)
        )
        stacks, structure = jax.tree.flatten(self._slots())
        written = write_slots(tuple(stacks), tuple(jax.tree.leaves(entries)), slot)
        return dataclasses.replace(self, **jax.tree.unflatten(structure, written)._asdict())

    def attend(
        self,
        row: int | Array,
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 J H"],
        v: Float[Array, "B 1 J H"],
        positions: Int[Array, "B 1"],
        spec: LayerSpec,
    ) -> tuple[Float[Array, "B 1 N H"], LayerStack]:
        """Writes one token of one layer at its cursor, as `append`, and attends to the layer.

        Adds up what the entries receive, if the stack keeps account of it.
        """
        stack, new = self, None
        if self.owners is not None:
            stack = self.append(row, k, v, positions)  # an entry for each of a list's heads
        else:
            slot = self._places(row, positions)
            key, value = _stored(k[:, 0], self.k), _stored(v[:, 0], self.v)
            new = NewEntry(k=key, v=value, slot=slot[:, 0])
            fresh = self._not_carried(slot)
            if self.carried is not None and fresh is not None:
                (carried,) = write_slots((self.carried,), (fresh,), slot)
                stack = dataclasses.replace(self, carried=carried)
        out, weights, written = decode_attention(
            q[:, 0],
            stack.k,
            stack.v,
            stack.positions,
            positions[:, 0],
            stack.owners,
            new,
            scale=spec.scale,
            softcap=spec.softcap,
            window=spec.window,
            sets=self.heads_per_list,
            # The whole stack: what is cut out of it is copied for a kernel.
            start=self.start(row),
            start_multiple=self.start_multiple(row),
            slots=self.size(row),
            weights=self.accumulates,
        )
        if written is not None:
            stack = dataclasses.replace(stack, **written._asdict())
        if weights is not None:
            stack = stack.receive(row, weights)
        return out[:, None], stack

    def _places(self, row: int | Array, positions: Int[Array, "B T"]) -> Int[Array, "B C"]:
        """Where new entries of a layer go among all slots; their number for those to leave out."""
        size, per_token = self.size(row), self.heads_per_list
        new = positions >= 0
        rank = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
        slot = self.used[row][:, None] + rank * per_token
        if self.ring:
            new &= rank > rank[:, -1:] - size
            slot %= size
        if self.owners is not None:
            slot = (slot[..., None] + jnp.arange(per_token)).reshape(slot.shape[0], -1)
            new = jnp.repeat(new, per_token, axis=1)
        return jnp.where(new & (slot < size), self.start(row) + slot, self.positions.shape[2])

    def _not_carried(self, slot: Int[Array, "B C"]) -> Float[Array, "B C N"] | None:
        """What new entries have in `carried`."""
        if self.carried is None:
            return None
        return jnp.full((*slot.shape, self.carried.shape[1]), -1.0, self.carried.dtype)

    def advance(self, count: Int[Array, " B"]) -> LayerStack:
        """Moves all cursors behind so many tokens of each row; to move one copies the others."""
        return dataclasses.replace(self, used=self.used + count * self.heads_per_list)

    def remember(
        self, row: int | Array, q: Float[Array, "B T N H"], positions: Int[Array, "B T"]
    ) -> LayerStack:
        """Keeps the last of these queries, if the stack keeps any."""
        if self.queries is None:
            return self
        kept = self.queries.shape[3]
        last = jnp.max(positions, axis=1, keepdims=True)
        new = (positions >= 0) & (positions > last - kept)
        slot = jnp.where(new, positions % kept, kept)  # out of bounds: dropped
        rows = jnp.arange(positions.shape[0])[:, None]

        def write(queries: Array, q: Array, slot: Array) -> Array:
            return queries.at[row, rows, :, slot].set(q, mode="drop")

        queries = move(write, self.queries, q.astype(self.queries.dtype), at=slot)
        return dataclasses.replace(self, queries=queries)

    def receive(self, row: int | Array, weights: Float[Array, "B N S"]) -> LayerStack:
        """Adds attention weights to what the entries of a layer have received."""
        assert self.carried is not None
        start, size = self.start(row), self.size(row)
        before = jax.lax.dynamic_slice_in_dim(self.carried, start, size, axis=2)
        after = jnp.maximum(before, 0.0) + weights
        carried = jax.lax.dynamic_update_slice_in_dim(self.carried, after, start, axis=2)
        return dataclasses.replace(self, carried=carried)

    def last_queries(self, row: int | Array, position: Int[Array, " B"]) -> Array:
        """[B, N, W, H] the W queries before `position`, oldest first."""
        if self.queries is None:
            return jnp.zeros((position.shape[0], 1, 0, 1), jnp.float32)
        kept = self.queries.shape[3]
        order = (position[:, None] + jnp.arange(1, kept)) % kept
        return jnp.take_along_axis(self.queries[row], order[:, None, :, None], axis=2)

    def _slots(self) -> LayerSlots:
        return LayerSlots(self.k, self.v, self.positions, self.owners, self.carried)


def _stored(x: Array, like: Array | QuantArray) -> Array | QuantArray:
    return quantize(x) if isinstance(like, QuantArray) else x
