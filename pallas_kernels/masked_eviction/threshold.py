"""Which entries are among the largest, by searching the threshold instead of sorting."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Strips of a row that are counted side by side; an int8 holds their number.
_STRIPS = 16


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
    uncounted = -values.shape[-1] % _STRIPS
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, uncounted)], constant_values=-1)
    low, exact = _bisect(
        lambda middle: _count(bits >= middle[..., None]),
        counts,
        jnp.zeros_like(counts),
        jnp.max(bits, axis=-1) + 1,
    )
    above = bits >= low[..., None]

    # More entries than asked for only where several equal the threshold: keep the first of them.
    ties = bits == low[..., None]
    surplus = _count(above) - counts
    kept_ties = _count(ties) - surplus
    columns = bits.shape[-1]
    index = jnp.arange(columns)
    cut, _ = _bisect(
        lambda middle: _count(ties & (index < columns - middle[..., None])),
        kept_ties,
        jnp.zeros_like(counts),
        jnp.full_like(counts, columns + 1),
        done=exact | (surplus == 0),
    )
    dropped = ties & (index >= columns - cut[..., None])
    marked = above & ~(dropped & (surplus > 0)[..., None])
    return marked[..., : values.shape[-1]]


def _count(marks: Bool[Array, "*B T"]) -> Int[Array, "*B"]:
    """How many entries of each row are True; T is a multiple of the strips.

    On CPU the strips are added to each other first: that is vectorised over their columns, which
    takes a quarter of the time of a sum along the row. The narrower type keeps XLA from merging
    the two sums into that one.
    """

    def by_strips(marks: Array) -> Array:
        strips = marks.reshape(*marks.shape[:-1], _STRIPS, -1)
        return jnp.sum(jnp.sum(strips, axis=-2, dtype=jnp.int8), axis=-1, dtype=jnp.int32)

    def along_row(marks: Array) -> Array:
        return jnp.sum(marks, axis=-1, dtype=jnp.int32)

    return jax.lax.platform_dependent(marks, cpu=by_strips, default=along_row)


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
