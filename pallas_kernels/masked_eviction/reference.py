"""Top-budget selection and compaction into fixed slots, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    values, chosen = jax.lax.top_k(importance, capacity)
    taken = (jnp.arange(capacity) < budget[:, None, None]) & (values > -jnp.inf)
    ordered = jnp.sort(jnp.where(taken, chosen, columns), axis=-1)
    return jnp.where(ordered < columns, ordered, -1)


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
