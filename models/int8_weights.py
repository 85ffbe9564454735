"""Weights as int8: each matrix has one scale for each of its outputs.

Half the memory of bfloat16, and products of int8, which processors of all kinds have instructions
for (see `models.matmul`). Norms, biases and activations stay floats.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, DTypeLike

from pallas_kernels.quantized import QuantArray, quantize

# Of a model whose matrices are int8: everything else.
_FLOATS = jnp.bfloat16


def float_dtype(shape: tuple[int, ...], dtype: DTypeLike) -> DTypeLike:
    """What a parameter of a model in `dtype` is read as, before `as_stored`."""
    if jnp.dtype(dtype) != jnp.int8:
        return dtype
    return jnp.float32 if _is_matrix(shape) else _FLOATS


def as_stored(path: str, value: Array, dtype: DTypeLike) -> Array | QuantArray:
    """What a model in `dtype` holds of a parameter.

    Args:
        path: the parameter's.
        value: [in, out] of projections, [vocab, width] of the embedding.
        dtype: a float type, or int8.

    Returns:
        The value cast, or of a matrix in int8 [out, in] with a scale for each output; of the
        embedding, whose rows are the outputs of a tied head, [vocab, width] with one for each row.
    """
    if jnp.dtype(dtype) != jnp.int8 or not _is_matrix(value.shape):
        return value.astype(float_dtype(value.shape, dtype))
    return _quantize(value, turned=_is_turned(path))


def place_int8(path: str, value: QuantArray, sharding: Sharding | None) -> QuantArray:
    """A matrix where it goes, given where it would go as floats.

    Args:
        path: the parameter's.
        value: as of `as_stored`.
        sharding: of [in, out], or of [vocab, width] for the embedding; None for the default
            device.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(value, sharding)
    axes = (*sharding.spec, None, None)[:2]
    outputs, inputs = reversed(axes) if _is_turned(path) else axes

    def on(*axes: Any) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return QuantArray(
        values=jax.device_put(value.values, on(outputs, inputs)),
        scale=jax.device_put(value.scale, on(outputs)),
    )


def _is_turned(path: str) -> bool:
    return path != "embed.w"


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


@functools.partial(jax.jit, static_argnames="turned")
def _quantize(value: Array, *, turned: bool) -> QuantArray:
    return quantize(value.T if turned else value)
