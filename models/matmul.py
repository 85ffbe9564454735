"""Products of activations and weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

__all__ = ["matmul"]


def matmul(
    x: Float[Array, "*B T I"],
    w: Float[Array, "I O"] | Float[Array, "O I"],
    dtype: DTypeLike | None = None,
    *,
    transposed: bool = False,
) -> Float[Array, "*B T O"]:
    """Products of rows and weights, summed in float32.

    On CPU, XLA has products of bfloat16 for matrices of two rows or more and float32 results. All
    others it computes from a float32 copy of the weights, of twice their size.

    Args:
        x: activations.
        w: weights.
        dtype: of the result; that of `x` if None.
        transposed: the weights are [O, I].
    """
    dtype = jnp.dtype(dtype or x.dtype)
    axes = ((1,), (int(transposed),)), ((), ())

    def on_cpu(x: Array, w: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 1:
            rows = jnp.broadcast_to(rows, (2, rows.shape[1]))
        y = jax.lax.dot_general(rows, w, axes, preferred_element_type=jnp.float32)
        return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], y.shape[-1]).astype(dtype)

    def elsewhere(x: Array, w: Array) -> Array:
        return jnp.matmul(x, w.T if transposed else w, preferred_element_type=dtype)

    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return elsewhere(x, w)
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=elsewhere)
