"""LaCache: a ladder over layers and positions, no scores (Shi et al., arXiv 2507.14204)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import Policy, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaCache(Policy):
    """Each layer keeps other positions of every block, so that the layers together cover more.

    Behind the sinks, blocks of b = 1 + ⌈(L - span) / (span - overlap)⌉ slots shrink to
    a = min(⌈span / (span - overlap)⌉, b) slots, which start at i mod (b - a + 1) in layer i; the
    blocks go on from the start until the budget holds. When only the L newest slots of the
    budget are left and it does not, the ladder starts over on what it has kept, with longer
    blocks and strides (iterative compaction). The kept sets are those of the published code for
    a prompt that comes in one piece, to a budget that already holds the ⌊(b - a) / 2⌋ slots that
    the code adds to its own; tokens keep their true positions. Longer blocks may overshoot: a few
    slots of the budget then stay empty, as do those for which the published code would look past
    the end of a prompt that is very long for its budget.

    Attributes:
        sinks: tokens at the start that are always kept.
        span: layers over which the ladder keeps a token.
        overlap: layers that neighbouring rungs share.
    """

    name: ClassVar[str] = "lacache"

    sinks: int = 4
    span: int = 16
    overlap: int = 0

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        require(self.sinks >= 0, "sinks", "at least 0", self.sinks)
        require(self.span >= 1, "span", "at least 1", self.span)
        holds = 0 <= self.overlap < self.span
        require(holds, "overlap", f"at least 0, below the span of {self.span}", self.overlap)

    @property
    def protected(self) -> int:
        """The sinks."""
        return self.sinks

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B K T"]:
        """The ladder's tokens pinned, all others never taken.

        Raises:
            ValueError: a model without more layers than the span, or a budget without room for
                the sinks, one slot a layer and one block.
        """
        filled = layer.filled[:, 0]  # the ladder is the same for all heads
        order = jnp.arange(layer.columns, dtype=jnp.int32) - (layer.columns - filled[:, None])
        kept = order >= 0
        if capacity < layer.columns:
            before, after = self.block_sizes(layer.num_layers)
            least = self.sinks + layer.num_layers + after
            require(capacity >= least, "budget", f"at least {least} slots for lacache", capacity)
            ladder = jax.vmap(self._kept_positions, in_axes=(0, 0, None, None, None, None))
            positions = ladder(
                filled, budget, layer.index, layer.num_layers, (before, after), capacity
            )
            marked = jax.vmap(_mark, in_axes=(0, None))(positions, layer.columns)
            # Entry i of a row sits at column i + T - length: the marks move right with the row.
            kept &= jnp.take_along_axis(marked, jnp.maximum(order, 0), axis=1)
        pinned = jnp.where(kept, jnp.float32(jnp.inf), -jnp.inf)[:, None]
        return jnp.broadcast_to(pinned, (*layer.k.shape[:2], layer.columns))

    def block_sizes(self, num_layers: int) -> tuple[int, int]:
        """Slots of a block before and after it shrinks, b and a.

        Raises:
            ValueError: the ladder of so few layers removes nothing.
        """
        step = self.span - self.overlap
        before = 1 + math.ceil((num_layers - self.span) / step)
        after = min(math.ceil(self.span / step), before)
        require(before > after, "span", f"a ladder that {num_layers} layers need", self.span)
        return before, after

    def _kept_positions(
        self,
        length: Int[Array, ""],
        budget: Int[Array, ""],
        index: int | Int[Array, ""],
        num_layers: int,
        blocks: tuple[int, int],
        capacity: int,
    ) -> Int[Array, " C"]:
        """Positions that a row keeps, those of empty slots beyond any column."""
        before, after = blocks
        fewer = before - after
        surplus = jnp.maximum(length - budget, 0)
        # Blocks that fit in front of the newest `num_layers` slots of the budget.
        room = jnp.maximum((budget - self.sinks - num_layers) // after, 1)
        first = jnp.minimum(_ceil_div(surplus, fewer), room)
        left = jnp.maximum(surplus - room * fewer, 0)
        times = jnp.maximum(_ceil_div(left, room * fewer), 1)
        longer = before + (times - 1) * (before - 1)
        second = _ceil_div(left, longer - after)

        slot = jnp.arange(capacity, dtype=jnp.int32)
        inner = _climb(slot, self.sinks, index, second, longer, after, times)
        outer = _climb(inner, self.sinks, index, first, before, after, 1)
        # The last of the longer blocks may reach past the end, and then nothing stays behind it.
        behind = length - first * fewer - self.sinks - second * longer
        size = jnp.minimum(length, self.sinks + second * after + jnp.maximum(behind, 0))
        return jnp.where(slot < size, outer, jnp.iinfo(jnp.int32).max)


def _climb(
    slot: Int[Array, " C"],
    start: int,
    index: int | Int[Array, ""],
    count: Int[Array, ""],
    before: int | Int[Array, ""],
    after: int,
    stride: int | Int[Array, ""],
) -> Int[Array, " C"]:
    """Where each slot's entry came from, when `count` blocks behind `start` shrank."""
    block, rung = jnp.divmod(slot - start, after)
    offset = index % (before - after + 1)
    shrunk = start + offset + before * block + stride * rung
    behind = slot + (before - after) * count
    return jnp.where(slot < start, slot, jnp.where(block < count, shrunk, behind))


def _mark(positions: Int[Array, " C"], columns: int) -> Bool[Array, " T"]:
    # Positions may repeat: the strides of a ladder that starts over can reach past its blocks.
    return jnp.zeros(columns, bool).at[positions].set(True, mode="drop")


def _ceil_div(x: Int[Array, ""], y: int | Int[Array, ""]) -> Int[Array, ""]:
    return -(-x // y)
