"""Budgets of the heads of one layer: how many entries each keeps of what they keep together."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction import largest
from restkv_jax.budget import part
from restkv_jax.protocols import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadAllocation(abc.ABC):
    """How the slots of a layer are spread over its J heads; frozen and hashable.

    Heads that share slots hold one flat list of entries, so their bytes are the sum of their
    budgets whatever each of them gets.

    Attributes:
        name: what the allocation is called on command lines and in results.
        lists: how many lists a layer's heads are dealt out to, the first heads to the first one;
            heads share the slots of their own list alone. A device holds whole lists, so heads
            that are split over n devices need a multiple of n of them, and then no exchange.
    """

    name: ClassVar[str]

    lists: int = 1

    def __post_init__(self) -> None:
        """Refuses what is no number of lists.

        Raises:
            ValueError: naming the option.
        """
        if self.lists < 1:
            raise ValueError(f"lists: expected at least 1, got {self.lists}")

    def lists_here(self, heads: int, spec: LayerSpec) -> int:
        """How many of the lists a device holds.

        Args:
            heads: sets of entries that it holds.
            spec: of the layer.

        Raises:
            ValueError: lists that cannot be dealt out evenly to the heads, or to the devices.
        """
        if self.lists % spec.head_shards:
            raise ValueError(
                f"heads: the heads of a layer are split over {spec.head_shards} devices of mesh "
                f"axis {spec.head_axis!r}, and {self.lists} shared list(s) ({self.name}) cannot "
                f"be: expected a multiple, such as lists={spec.head_shards}"
            )
        here = self.lists // spec.head_shards
        if heads % here:
            raise ValueError(f"lists: {heads} heads cannot be dealt out evenly to {here} lists")
        return here

    def capacity(self, slots: int, heads: int, layer: int) -> int:
        """F, static: entries of a list.

        Args:
            slots: of a head on average.
            heads: how many share a list.
            layer: static index.
        """
        del layer
        return slots * heads

    def spread(
        self,
        importance: Float[Array, "B J T"],
        budget: Int[Array, " B"],
        slots: int,
        layer: int,
        spec: LayerSpec,
    ) -> Int[Array, "B J"]:
        """`counts` of the heads of every list that this device holds.

        Arguments as of `counts`, and the layer's spec.
        """
        batch, heads, columns = importance.shape
        lists = self.lists_here(heads, spec)
        by_list = importance.reshape(batch * lists, -1, columns)
        found = self.counts(by_list, jnp.repeat(budget, lists), slots, layer)
        return found.reshape(batch, heads)

    @abc.abstractmethod
    def counts(
        self, importance: Float[Array, "B J T"], budget: Int[Array, " B"], slots: int, layer: int
    ) -> Int[Array, "B J"]:
        """Entries that each head of one list keeps, pinned ones included.

        Args:
            importance: +inf for what is always kept, -inf for padding.
            budget: entries a head in each row, on average.
            slots: static upper bound of `budget`.
            layer: static index, for allocations that differ by layer.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithFloor(HeadAllocation):
    """An allocation by scores that leaves no head without entries."""

    floor: float = 0.2

    def __post_init__(self) -> None:
        """Refuses a floor that is no share.

        Raises:
            ValueError: naming the option.
        """
        HeadAllocation.__post_init__(self)
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor: expected a share within [0, 1], got {self.floor!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(_WithFloor):
    """Shares by how many of the layer's best scores a head holds (Feng et al., 2407.11550).

    Attributes:
        floor: share of the mean budget that every head gets.
        normalize: scale each head's scores by the share of their sum that its best ones hold.
    """

    name: ClassVar[str] = "adakv"

    normalize: bool = True

    def counts(
        self, importance: Float[Array, "B J T"], budget: Int[Array, " B"], slots: int, layer: int
    ) -> Int[Array, "B J"]:
        """As published; where rounding asks for more than there is, the largest heads give."""
        del layer
        pinned, past, scores = _split(importance, budget)
        shares = adakv_counts(scores, past, most=slots, floor=self.floor, normalize=self.normalize)
        surplus = jnp.maximum(jnp.sum(shares, axis=-1) - importance.shape[1] * past, 0)
        largest_first = jnp.argsort(jnp.argsort(-shares, axis=-1), axis=-1)
        return pinned + shares - (largest_first < surplus[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBudget(_WithFloor):
    """The layer's best scores, whichever heads they belong to.

    For scores that are comparable between heads, as ReST-KV's are: errors of the layer's output,
    all in the same units. Our own; nothing is normalised.

    Attributes:
        floor: share of the mean budget that every head's best scores fill in any case.
    """

    name: ClassVar[str] = "shared"

    def counts(
        self, importance: Float[Array, "B J T"], budget: Int[Array, " B"], slots: int, layer: int
    ) -> Int[Array, "B J"]:
        """How many of the J · past best scores each head holds, its floor counted as best."""
        del layer
        pinned, past, scores = _split(importance, budget)
        heads = scores.shape[1]
        sure = jnp.floor(part(past, self.floor)).astype(jnp.int32)[:, None, None]
        most = min(slots, scores.shape[-1])
        _, best = largest(scores, most)
        best = jnp.where(jnp.arange(most) < sure, best, scores.shape[-1])
        floor = jnp.put_along_axis(
            jnp.zeros(scores.shape, bool), best, True, axis=-1, inplace=False, mode="drop"
        )
        scores = jnp.where(floor & (scores > -jnp.inf), jnp.inf, scores)
        return pinned + _winners(scores, heads * past, heads * most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenHeads(HeadAllocation):
    """Budgets that were found once for a model, see `calibrate_head_budgets`.

    Attributes:
        slots: for each layer the slots of each of its heads, what is always kept included.
    """

    name: ClassVar[str] = "frozen"

    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Refuses budgets that are no table.

        Raises:
            ValueError: naming the layer.
        """
        HeadAllocation.__post_init__(self)
        for layer, heads in enumerate(self.slots):
            if not heads or min(heads) < 1:
                raise ValueError(f"slots: layer {layer}: expected at least 1 a head, got {heads}")

    def capacity(self, slots: int, heads: int, layer: int) -> int:
        """The largest of the lists' sums.

        Raises:
            ValueError: budgets of another model.
        """
        del slots
        expected = heads * self.lists
        if layer >= len(self.slots) or len(self.slots[layer]) != expected:
            raise ValueError(
                f"slots: expected {expected} heads in layer {layer}, got budgets for "
                f"{[len(heads) for heads in self.slots]}"
            )
        own = self.slots[layer]
        return max(sum(own[i : i + heads]) for i in range(0, expected, heads))

    def spread(
        self,
        importance: Float[Array, "B J T"],
        budget: Int[Array, " B"],
        slots: int,
        layer: int,
        spec: LayerSpec,
    ) -> Int[Array, "B J"]:
        """The same for every row; of all the layer's heads those that this device holds."""
        del budget, slots
        fixed = jnp.asarray(self.slots[layer], jnp.int32)
        if spec.head_axis is not None:
            heads = importance.shape[1]
            first = jax.lax.axis_index(spec.head_axis) * heads
            fixed = jax.lax.dynamic_slice_in_dim(fixed, first, heads)
        return jnp.broadcast_to(fixed, importance.shape[:2])

    def counts(
        self, importance: Float[Array, "B J T"], budget: Int[Array, " B"], slots: int, layer: int
    ) -> Int[Array, "B J"]:
        """The same for every row, all heads of a layer in one list."""
        del budget, slots
        fixed = jnp.asarray(self.slots[layer], jnp.int32)
        return jnp.broadcast_to(fixed, importance.shape[:2])


def adakv_counts(
    scores: Float[Array, "B J P"],
    past: Int[Array, " B"],
    *,
    most: int,
    floor: float = 0.2,
    normalize: bool = True,
) -> Int[Array, "B J"]:
    """Past tokens that AdaKV gives to each head of a layer.

    The J · past largest scores of all heads are counted by head, c; a head then gets
    round(c · (1 - floor) + ⌊past · floor⌋), halves to even. The sum may miss J · past by a few.

    Args:
        scores: pooled scores, -inf where there is no token that may go.
        past: tokens kept by a head on average in each row, what is always kept not counted.
        most: static upper bound of `past`.
        floor: share of `past` that every head gets.
        normalize: scale each head's scores by the share of their sum that its `past` largest hold.
    """
    heads, columns = scores.shape[1:]
    most = min(most, columns)
    if normalize:
        finite = jnp.where(scores > -jnp.inf, scores, 0.0)
        best = jax.lax.top_k(finite, most)[0]
        held = jnp.sum(jnp.where(jnp.arange(most) < past[:, None, None], best, 0.0), axis=-1)
        total = jnp.maximum(jnp.sum(finite, axis=-1), jnp.finfo(scores.dtype).tiny)
        scores = jnp.where(scores > -jnp.inf, scores * (held / total)[..., None], -jnp.inf)
    counts = _winners(scores, heads * past, heads * most)
    sure = jnp.floor(part(past, floor))[:, None]
    return jnp.round(part(counts, 1.0 - floor) + sure).astype(jnp.int32)


def _winners(
    scores: Float[Array, "B J P"], wanted: Int[Array, " B"], most: int
) -> Int[Array, "B J"]:
    """How many of the row's `wanted` largest scores each head holds, -inf left out."""
    batch, heads, columns = scores.shape
    best, chosen = largest(scores.reshape(batch, -1), min(most, heads * columns))
    counted = (best > -jnp.inf) & (jnp.arange(best.shape[-1]) < wanted[:, None])
    head = jnp.where(counted, chosen // columns, heads)
    return jnp.sum(head[:, None] == jnp.arange(heads)[:, None], axis=-1, dtype=jnp.int32)


def _split(
    importance: Float[Array, "B J T"], budget: Int[Array, " B"]
) -> tuple[Int[Array, "B J"], Int[Array, " B"], Float[Array, "B J T"]]:
    """Each head's pinned entries, what the budget leaves beside them, scores of the rest."""
    pinned = jnp.sum(importance == jnp.inf, axis=-1, dtype=jnp.int32)
    past = jnp.maximum(budget - jnp.max(pinned, axis=-1), 0)
    return pinned, past, jnp.where(importance == jnp.inf, -jnp.inf, importance)
