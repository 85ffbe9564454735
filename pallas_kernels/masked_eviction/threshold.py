"""Which entries are among the largest, by searching the threshold instead of sorting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.masked_eviction import kernel_tpu
from pallas_kernels.triton_extra import run_triton, without_triton
from pallas_kernels.varying import vary_like

# Strips of a row that are counted side by side; an int8 holds their number.
_STRIPS = 16

# Columns whose ties are counted together.
_BLOCK = 256

_INFINITY = 0x7F800000  # its bits in float32


def top_mask(values: Float[Array, "*B T"], counts: Int[Array, "*B"]) -> Bool[Array, "*B T"]:
    """Marks the `counts` largest entries of each row, ties by position, the lower one first.

    The bits of non-negative floats are ordered as the floats are, so the k-th largest is found on
    integers, by counting.

    Args:
        values: float32, at least 0.
        counts: how many to mark in each row, from 1 to T.
    """
    low, cut = search_thresholds(values, counts)
    # One comparison: from the cut on, an entry has to be larger.
    behind = (jnp.arange(values.shape[-1], dtype=jnp.int32) >= cut[..., None]).astype(jnp.int32)
    return _bits(values) >= low[..., None] + behind


def search_thresholds(
    values: Float[Array, "*B T"],
    counts: Int[Array, "*B"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """What tells the `counts` largest entries of each row: a threshold, and where its equals end.

    They are those whose bits are above the threshold, and those that equal it in the columns
    before the cut. In the kernels, as at the beginning of `masked_eviction`, a program for each
    row reads it from a cache or from VMEM.

    Args:
        values: float32, at least 0.
        counts: how many entries to find in each row, from 1 to T.
        implementation: see `dispatch`.

    Returns:
        thresholds and cuts.

    Raises:
        NotImplementedError: the implementation that was named cannot run this.
    """

    def by_kernel(thresholds: Callable[..., Any], values: Array, counts: Array) -> Any:
        found = thresholds(values.reshape(-1, values.shape[-1]), counts.reshape(-1))
        return tuple(x.reshape(counts.shape) for x in found)

    def triton(*args: Array) -> Any:
        return by_kernel(run_triton("masked_eviction", "thresholds_triton"), *args)

    return dispatch(
        "search_thresholds",
        implementation,
        values,
        counts,
        reference=lambda *args: jax.lax.platform_dependent(*args, cpu=by_halves, default=by_digits),
        kernels=(
            Kernel("pallas_tpu", functools.partial(by_kernel, kernel_tpu.thresholds)),
            Kernel("triton", triton, without_triton("masked_eviction")),
        ),
    )


def by_halves(
    values: Float[Array, "*B T"], counts: Int[Array, "*B"]
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """See `search_thresholds`; each step counts in a pass what reaches one threshold.

    The search ends as soon as every row has met its count, at the latest after 31 steps. Only ties
    keep a row from it, and only then cuts are looked for.
    """

    def reached(threshold: Array) -> Array:
        # The barrier ties the values to what changes. XLA would else take their bits before the
        # loop, which on CPU is a copy, and this is all memory.
        held, threshold = jax.lax.optimization_barrier((values, threshold))
        return row_sum(_bits(held) >= threshold[..., None])

    low, exact = _bisect(
        reached,
        counts,
        vary_like(jnp.zeros_like(counts), values, counts),
        jnp.full_like(counts, _INFINITY + 1),  # a step more, which costs less than a maximum
    )
    whole = vary_like(jnp.full(counts.shape, values.shape[-1], jnp.int32), values, counts)
    cut = jax.lax.cond(
        jnp.all(exact), lambda: whole, lambda: _cut_of_ties(_bits(values), low, counts)
    )
    return low, cut


def by_digits(
    values: Float[Array, "*B T"], counts: Int[Array, "*B"]
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """See `search_thresholds`; eight passes count for the 15 values of the next four bits each.

    How many there are is known, so that the host of a GPU waits for none of them. XLA reads the
    rows twice for the 15 counts of a pass.
    """
    # In which 15 << 28 is a number, though none of theirs.
    unsigned = jax.lax.bitcast_convert_type(values, jnp.uint32)

    def digit(i: Array, low: Array) -> Array:
        shift = 28 - 4 * i.astype(jnp.uint32)
        steps = [low + (jnp.uint32(d) << shift) for d in range(1, 16)]
        found = [row_sum(unsigned >= step[..., None]) for step in steps]
        for step, count in zip(steps, found, strict=True):
            low = jnp.where(count >= counts, step, low)
        return low

    start = vary_like(jnp.zeros(counts.shape, jnp.uint32), values, counts)
    low = jax.lax.fori_loop(0, 8, digit, start).astype(jnp.int32)
    return low, _cut_of_ties(_bits(values), low, counts)


def _bits(values: Float[Array, "*B T"]) -> Int[Array, "*B T"]:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def row_sum(x: Int[Array, "*B T"] | Bool[Array, "*B T"]) -> Int[Array, "*B"]:
    """Sums along the rows, as int32; of booleans, how many are True.

    On CPU strips of a row are added to each other first: that is vectorised over their columns,
    which takes a quarter of the time of a sum along the row. The type between the two sums, int8
    or one of the same bits as int32, keeps XLA from merging them into that one.
    """
    uneven = -x.shape[-1] % _STRIPS

    def by_strips(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, uneven)])
        strips = x.reshape(*x.shape[:-1], _STRIPS, -1)
        if x.dtype == bool:
            return jnp.sum(jnp.sum(strips, axis=-2, dtype=jnp.int8), axis=-1, dtype=jnp.int32)
        sums = jax.lax.bitcast_convert_type(jnp.sum(strips, axis=-2, dtype=jnp.int32), jnp.uint32)
        return jax.lax.bitcast_convert_type(jnp.sum(sums, axis=-1, dtype=jnp.uint32), jnp.int32)

    def along_row(x: Array) -> Array:
        return jnp.sum(x, axis=-1, dtype=jnp.int32)

    return jax.lax.platform_dependent(x, cpu=by_strips, default=along_row)


def _cut_of_ties(
    bits: Int[Array, "*B T"], low: Int[Array, "*B"], counts: Int[Array, "*B"]
) -> Int[Array, "*B"]:
    """The column before which what equals a threshold belongs to the `counts` largest.

    Ties are counted by block, and the last one that belongs is looked for in its own block.
    """
    columns, block = bits.shape[-1], min(_BLOCK, bits.shape[-1])
    total = functools.partial(jnp.sum, axis=-1, dtype=jnp.int32)
    running = functools.partial(jnp.cumsum, axis=-1, dtype=jnp.int32)
    # What is above in the upper half of a number, ties in the lower: one pass counts both.
    both = ((bits > low[..., None]).astype(jnp.int32) << 16) + (bits == low[..., None])
    both = jnp.pad(both, [(0, 0)] * (bits.ndim - 1) + [(0, -columns % block)])
    both = row_sum(both.reshape(*both.shape[:-1], -1, block))
    wanted = (counts - total(both >> 16))[..., None]
    until = running(both & 0xFFFF)
    last = total(until < wanted)[..., None]
    before = jnp.where(last > 0, jnp.take_along_axis(until, last - 1, axis=-1), 0)
    own = last * block + jnp.arange(block, dtype=jnp.int32)
    tied = jnp.take_along_axis(bits, own, axis=-1, mode="clip") == low[..., None]
    rank = before + running(tied)
    return last[..., 0] * block + total(rank < wanted) + 1


def _bisect(
    count: Callable[[Array], Array],
    wanted: Int[Array, "*B"],
    low: Int[Array, "*B"],
    high: Int[Array, "*B"],
) -> tuple[Int[Array, "*B"], Bool[Array, "*B"]]:
    """The largest x in [low, high) with count(x) >= wanted, count falling; or one that meets it.

    Returns:
        x, and whether count(x) is known to equal `wanted`.
    """

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        low, high, exact = state
        return jnp.any((high - low > 1) & ~exact)

    def halve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, exact = state
        middle = low + (high - low) // 2
        found = count(middle)
        enough = found >= wanted
        return (
            jnp.where(exact | ~enough, low, middle),
            jnp.where(exact | enough, high, middle),
            exact | (found == wanted),
        )

    start = vary_like((low, high, jnp.zeros(low.shape, bool)), wanted, low)
    low, _, exact = jax.lax.while_loop(unfinished, halve, start)
    return low, exact
