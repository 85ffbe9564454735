"""Products, norms and quotients in float32, whose derivatives are finite where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The smallest normal float32: below it a sum of weights counts as nothing at all.
TINY = float(jnp.finfo(jnp.float32).tiny)
# Of products of float32; those of bfloat16 are exact in any case.
FLOAT32 = jax.lax.Precision.HIGHEST


def product(x: Float[Array, "*B M R"], y: Float[Array, "*B R C"]) -> Float[Array, "*B M C"]:
    """Of two matrices, in float32."""
    return jnp.matmul(x, y, precision=FLOAT32)


def three_parts(x: Float[Array, "N H R"]) -> Float[Array, "parts N H R"]:
    """Three of bfloat16, the smallest first, whose sum is x, a float32 that is not tiny."""
    parts: list[Array] = []
    for _ in range(3):
        # XLA may leave out a conversion to bfloat16 and back, but not this.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.insert(0, part.astype(jnp.bfloat16))
        x -= part
    return jnp.stack(parts)


def norm(x: Float[Array, "*B R"]) -> Float[Array, "*B"]:
    """‖x‖, whose derivative at 0 is taken for 0."""
    # A product with ones: on CPU a sum over the last axis takes longer.
    return root(product(jnp.square(x), jnp.ones(x.shape[-1], x.dtype)))


def root(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """√x, whose derivative at 0 is taken for 0."""
    positive = x > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def divided(x: Float[Array, "*B T"], total: Float[Array, "*B"]) -> Float[Array, "*B T"]:
    """Weights over a sum that holds them; 0 if it is.

    Both are scaled to about 1 before, as the derivative of a quotient divides by a square.
    """
    some = (total > TINY)[..., None]
    scale = jnp.where(some, jax.lax.stop_gradient(total)[..., None], 1.0)
    return jnp.where(some, x / scale, 0.0) / jnp.where(some, total[..., None] / scale, 1.0)


def at_least_tiny(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """A divisor; what is below counts as a constant."""
    return jnp.where(x > TINY, x, TINY)
