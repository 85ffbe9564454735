"""Attention of one new token over the cache's slots, in plain XLA."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantized import QuantArray

Tree = TypeVar("Tree")


def decode_attention_xla(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    start: int | Int[Array, ""] | None = None,
    *,
    scale: float,
    softcap: float | None,
    weights: bool,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None]:
    """See `pallas_kernels.decode_attention.decode_attention`; logits and sums in float32."""
    k, v = layer_of((k, v), start, visible.shape[2])
    batch, heads, size = q.shape
    cache_heads, slots = k.shape[1:3]
    grouped = q.reshape(batch, cache_heads, -1, size)  # [B, J, G, H]
    logits = scale * jnp.einsum(
        "bjgh,bjsh->bjgs", grouped, _numbers(k, q), preferred_element_type=jnp.float32
    )
    if isinstance(k, QuantArray):
        logits *= k.scale[:, :, None]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(visible.reshape(batch, cache_heads, -1, slots), logits, -jnp.inf)
    numerators, total = softmax(logits)
    values = _numbers(v, q)
    scaled = numerators * v.scale[:, :, None] if isinstance(v, QuantArray) else numerators
    out = jnp.einsum(
        "bjgs,bjsh->bjgh", scaled.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    out = (out / total).reshape(q.shape).astype(q.dtype)
    return out, (numerators / total).reshape(batch, heads, slots) if weights else None


def softmax(logits: Float[Array, "... S"]) -> tuple[Float[Array, "... S"], Float[Array, "... 1"]]:
    """Numerators and denominator of the softmax; 0 and 1 where all logits are -inf."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    numerators = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(numerators, axis=-1, keepdims=True)
    return numerators, jnp.where(total == 0.0, 1.0, total)


def layer_of(stack: Tree, start: int | Int[Array, ""] | None, slots: int) -> Tree:
    """The slots of one layer, cut out of arrays that hold those of many along axis 2."""
    if start is None:
        return stack
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, slots, axis=2), stack)


def _numbers(x: Array | QuantArray, like: Array) -> Array:
    # Levels of int8 are exact in bfloat16 and float32 alike.
    return x.values.astype(like.dtype) if isinstance(x, QuantArray) else x
