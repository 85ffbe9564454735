"""Top-budget selection and compaction into fixed slots, in plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized import QuantArray


class Kept(NamedTuple):
    """What stays of each head, in order of column; empty slots come last.

    Attributes:
        k: [B, J, C, H] keys, zeros in empty slots.
        v: [B, J, C, H] values.
        positions: [B, J, C] -1 for empty slots.
        columns: [B, J, C] where each entry was, -1 for empty slots.
    """

    k: Float[Array, "B J C H"] | QuantArray
    v: Float[Array, "B J C H"] | QuantArray
    positions: Int[Array, "B J C"]
    columns: Int[Array, "B J C"]


def masked_eviction(
    importance: Float[Array, "B J T"],
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    positions: Int[Array, "B M T"],
    budget: Int[Array, " B"],
    *,
    capacity: int,
) -> Kept:
    """See the public function."""
    kept = min(capacity, importance.shape[-1])
    columns = select_slots(importance, capacity=kept, budget=jnp.minimum(budget, kept))
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, capacity - kept)), constant_values=-1)
    return Kept(*take(columns, k, v, positions), columns)


def take(
    columns: Int[Array, "B J C"],
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    positions: Int[Array, "B M T"],
) -> tuple[Array | QuantArray, Array | QuantArray, Int[Array, "B J C"]]:
    """Keys, values and positions of the chosen columns; zeros and -1 in empty slots (-1)."""

    def moved(x: Array) -> Array:
        filled = (columns >= 0).reshape(*columns.shape, *(1,) * (x.ndim - 3))
        return jnp.where(filled, compact(x, columns), 0)

    k, v = (jax.tree.map(moved, x) for x in (k, v))
    return k, v, jnp.where(columns >= 0, compact(positions, columns), -1)


def select_slots(
    importance: Float[Array, "B K T"], *, capacity: int, budget: Int[Array, " B"]
) -> Int[Array, "B K C"]:
    """The columns of the `budget` largest importances, in ascending order.

    Ties go to the lower column. Columns of importance -inf are never taken; a slot that stays
    empty holds -1, and the empty ones come last.

    Args:
        importance: what is lost with each column; +inf pins it.
        capacity: C, slots to fill, at most T.
        budget: slots that each row may fill, at most C.
    """
    columns = importance.shape[-1]
    values, chosen = largest(importance, capacity)
    taken = (jnp.arange(capacity) < budget[:, None, None]) & (values > -jnp.inf)
    ordered = jnp.sort(jnp.where(taken, chosen, columns), axis=-1)
    return jnp.where(ordered < columns, ordered, -1)


def select_flat(
    importance: Float[Array, "B J T"], counts: Int[Array, "B J"], *, capacity: int
) -> tuple[Int[Array, "B 1 F"], Int[Array, "B 1 F"]]:
    """The `counts` largest importances of each head, as one list by head and column.

    Ties go to the lower column. Columns of importance -inf are never taken.

    Args:
        importance: +inf pins a column.
        counts: entries that each head may keep, together at most F.
        capacity: F, entries to fill.

    Returns:
        Head and column of each entry, -1 for empty ones, which come last.
    """
    batch, heads, columns = importance.shape
    most = min(capacity, columns)
    values, chosen = largest(importance, most)
    taken = (jnp.arange(most) < counts[..., None]) & (values > -jnp.inf)
    mask = jnp.put_along_axis(
        jnp.zeros(importance.shape, bool),
        jnp.where(taken, chosen, columns),  # out of bounds: dropped
        True,
        axis=-1,
        inplace=False,
        mode="drop",
    ).reshape(batch, -1)
    entry = jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, capacity)
    source = jnp.broadcast_to(jnp.arange(heads * columns, dtype=jnp.int32), mask.shape)
    empty = jnp.full((batch, capacity), -1, jnp.int32)
    flat = jnp.put_along_axis(empty, entry, source, axis=-1, inplace=False, mode="drop")[:, None]
    return jnp.where(flat >= 0, flat // columns, -1), jnp.where(flat >= 0, flat % columns, -1)


def largest(
    values: Float[Array, "*B T"], count: int
) -> tuple[Float[Array, "*B C"], Int[Array, "*B C"]]:
    """The C = `count` largest of each row and their columns, ties by column, -0 a tie with 0."""
    # `top_k` alone puts 0 before -0, wherever they are.
    return jax.lax.top_k(jnp.where(values == 0.0, 0.0, values), count)


def compact(x: Float[Array, "B K T *E"], columns: Int[Array, "B J C"]) -> Float[Array, "B J C *E"]:
    """Gathers the chosen columns of each head.

    Args:
        x: one entry per column of each key/value head, or of one head for all (K = 1).
        columns: columns to keep for each of J heads, J a multiple of K; head j reads head
            j // (J / K) of `x`. Empty slots (-1) receive column 0: mask them by position.
    """
    batch, heads, slots = columns.shape
    index = jnp.maximum(columns, 0).reshape(batch, x.shape[1], -1)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 3))
    taken = jnp.take_along_axis(x, index, axis=2)
    return taken.reshape(batch, heads, slots, *x.shape[3:])
