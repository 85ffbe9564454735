"""Which entries are among the largest, by searching the threshold instead of sorting."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Strips of a row that are counted side by side; an int8 holds their number.
_STRIPS = 16

_INFINITY = 0x7F800000  # its bits in float32


def top_mask(values: Float[Array, "*B T"], counts: Int[Array, "*B"]) -> Bool[Array, "*B T"]:
    """Marks the `counts` largest entries of each row, ties by position, the lower one first.

    The bits of non-negative floats are ordered as the floats are, so the k-th largest is found by
    bisection on integers: each step counts, in one pass over the row, and the search ends as soon
    as every row has met its count, at the latest after 31 steps.

    Args:
        values: float32, at least 0.
        counts: how many to mark in each row, from 1 to T.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    low, exact = _bisect(
        lambda middle: row_sum(bits >= middle[..., None]),
        counts,
        jnp.zeros_like(counts),
        jnp.full_like(counts, _INFINITY + 1),  # a step more, which costs less than a maximum
    )
    return jax.lax.cond(
        jnp.all(exact), lambda: bits >= low[..., None], lambda: _first_ties(bits, low, counts)
    )


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


def _first_ties(
    bits: Int[Array, "*B T"], low: Int[Array, "*B"], counts: Int[Array, "*B"]
) -> Bool[Array, "*B T"]:
    """Marks what lies above `low`, and the first of what equals it up to the count."""
    above, ties = bits >= low[..., None], bits == low[..., None]
    surplus = row_sum(above) - counts
    columns = bits.shape[-1]
    index = jnp.arange(columns)
    cut, _ = _bisect(
        lambda middle: row_sum(ties & (index < columns - middle[..., None])),
        row_sum(ties) - surplus,
        jnp.zeros_like(counts),
        jnp.full_like(counts, columns + 1),
        done=surplus == 0,
    )
    dropped = ties & (index >= columns - cut[..., None])
    return above & ~(dropped & (surplus > 0)[..., None])


def _bisect(
    count: Callable[[Array], Array],
    wanted: Int[Array, "*B"],
    low: Int[Array, "*B"],
    high: Int[Array, "*B"],
    done: Bool[Array, "*B"] | None = None,
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

    start = low, high, jnp.zeros(low.shape, bool) if done is None else done
    low, _, exact = jax.lax.while_loop(unfinished, halve, start)
    return low, exact
