"""Weights, as floats or int8: products with activations, and rows of a table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Int8

from pallas_kernels.bits import move
from pallas_kernels.dispatch import with_derivatives_of
from pallas_kernels.quantized import QuantArray, dequantize, quantize
from pallas_kernels.varying import vary_like

__all__ = ["lookup", "matmul"]

# Up to so many, rounding the rows of activations beats turning int8 weights into floats.
_FEW_ROWS = 64


def matmul(
    x: Float[Array, "*B T I"],
    w: Float[Array, "I O"] | Float[Array, "O I"] | QuantArray,
    dtype: DTypeLike | None = None,
    *,
    transposed: bool = False,
) -> Float[Array, "*B T O"]:
    """Products of rows and weights, summed in float32.

    On CPU, XLA has products of bfloat16 for matrices of two rows or more and float32 results. All
    others it computes from a float32 copy of the weights, of twice their size. It has products of
    int8 as well, which the activations of few rows are rounded to. On GPU, it multiplies a single
    row with a matrix of less than 10^7 numbers element by element, writes all of that, and reads it
    again to sum it up; nor does it take several such products together.

    Args:
        x: activations.
        w: weights; as int8 always [O, I].
        dtype: of the result; that of `x` if None.
        transposed: float weights are [O, I].
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, QuantArray):
        y = _by_int8(x.reshape(-1, x.shape[-1]), w.values, w.scale)
        return y.reshape(*x.shape[:-1], y.shape[-1]).astype(dtype)
    axes = ((1,), (int(transposed),)), ((), ())

    def of_two_rows(x: Array, w: Array) -> Array:
        rows = _two_or_more(x.reshape(-1, x.shape[-1]))
        sums = dtype if dtype.itemsize > 4 else jnp.float32
        y = jax.lax.dot_general(rows, w, axes, preferred_element_type=sums)
        return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], y.shape[-1]).astype(dtype)

    def elsewhere(x: Array, w: Array) -> Array:
        return jnp.matmul(x, w.T if transposed else w, preferred_element_type=dtype)

    platforms = {
        "cpu": x.dtype == w.dtype == jnp.bfloat16,
        "cuda": x.size == x.shape[-1],
    }
    ways = {platform: of_two_rows for platform, best in platforms.items() if best}
    return jax.lax.platform_dependent(x, w, default=elsewhere, **ways) if ways else elsewhere(x, w)


def lookup(
    table: Float[Array, "V D"] | QuantArray, at: Int[Array, "*B"], dtype: DTypeLike
) -> Float[Array, "*B D"]:
    """Rows of a table."""
    if isinstance(table, QuantArray):
        return dequantize(jax.tree.map(lambda leaf: leaf[at], table), dtype)
    return move(lambda table, at: table[at], table, at=at).astype(dtype)


def _by_int8(
    x: Float[Array, "R I"], values: Int8[Array, "O I"], scale: Float[Array, " O"]
) -> Float[Array, "R O"]:
    """In float32. Few rows wait for the weights, which are then best read as they are."""
    if x.shape[0] > _FEW_ROWS:
        return _by_levels(x, values, scale)
    # Rounded activations would have none.
    on_cpu = with_derivatives_of(_by_levels, _by_two_rows)
    return jax.lax.platform_dependent(x, values, scale, cpu=on_cpu, default=_by_levels)


def _by_levels(x: Array, values: Array, scale: Array) -> Array:
    """With the levels as floats, which are exact in 16 bits."""

    def late(x: Array, values: Array) -> Array:
        # Always 0, though compilers do not see it: they would turn all weights into floats at once,
        # before the activations are there or the loop begins.
        nothing = jnp.minimum(jnp.any(jnp.isnan(x[:1, :1])).astype(values.dtype), 0)
        return values + nothing

    def now(x: Array, values: Array) -> Array:
        # Products convert them on the way; to add nothing would be to copy them.
        return vary_like(values, x)

    levels = jax.lax.platform_dependent(x, values, cuda=now, default=late).astype(x.dtype)
    return matmul(x, levels, jnp.float32, transposed=True) * scale[None]


def _by_two_rows(x: Array, values: Array, scale: Array) -> Array:
    """With each row of activations as two of int8, the second of what the first leaves of it.

    All products are of int8, and the sums exact up to 2^31 / 127^2 = 133,000 inputs. One row alone,
    255 levels for numbers of which some are far larger than the rest, would cost more precision
    than the weights do.
    """
    x = x.astype(jnp.float32)
    coarse = quantize(x)
    fine = quantize(x - dequantize(coarse, jnp.float32))
    rows = jnp.concatenate([coarse.values, fine.values])
    axes = ((1,), (1,)), ((), ())
    sums = jax.lax.dot_general(rows, values, axes, preferred_element_type=jnp.int32)
    of_coarse, of_fine = jnp.split(sums.astype(jnp.float32), 2)
    y = of_coarse * coarse.scale[:, None] + of_fine * fine.scale[:, None]
    return y * scale[None]


def _two_or_more(rows: Array) -> Array:
    """A single row twice: XLA has no fast products of fewer on CPU and GPU; memory decides."""
    return jnp.broadcast_to(rows, (2, rows.shape[1])) if rows.shape[0] == 1 else rows
