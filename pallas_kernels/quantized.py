"""Numbers as int8 with one scale per entry, symmetric around 0: keys and values, weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8

# The range is symmetric: -128 is never used.
_LARGEST = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantArray:
    """x ≈ values · scale, one scale for the H numbers of each entry.

    Attributes:
        values: [..., H] int8.
        scale: [...] float32.
    """

    values: Int8[Array, "*E H"]
    scale: Float[Array, "*E"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        return self.values.shape


def quantize(x: Float[Array, "*E H"]) -> QuantArray:
    """Rounds each entry to 255 levels; the error of a number is at most scale / 2.

    Entries of zeros have scale 0 and stay zeros.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    levels = jnp.round(x / jnp.where(scale > 0.0, scale, 1.0)[..., None])
    return QuantArray(values=levels.astype(jnp.int8), scale=scale)


def dequantize(x: Array | QuantArray, dtype: DTypeLike) -> Float[Array, "*E H"]:
    """The numbers themselves; an array that is not quantised is only cast."""
    if isinstance(x, QuantArray):
        return (x.values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)
    return x.astype(dtype)
