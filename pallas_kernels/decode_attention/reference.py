"""Attention of one new token over the cache's slots, in plain XLA."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.quantized import QuantArray


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J S H"] | QuantArray,
    v: Float[Array, "B J S H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"]]:
    """softmax(q kᵀ) v over the visible slots; logits, softmax and sums in float32.

    Args:
        q: the new token's queries; query head n reads head n // (N / J) of the cache.
        k: cached keys, the new token's among them; int8 ones are scaled after the products.
        v: cached values.
        visible: True for slots that the query may look at, by cache head (M = J) or by query
            head (M = N). The others weigh 0 and may hold any finite number. A row that sees
            nothing gives zeros.
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.

    Returns:
        The outputs, and the weights of all slots in float32.
    """
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
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)
    values = _numbers(v, q)
    scaled = weights * v.scale[:, :, None] if isinstance(v, QuantArray) else weights
    out = jnp.einsum(
        "bjgs,bjsh->bjgh", scaled.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    out = (out / total).reshape(q.shape).astype(q.dtype)
    return out, (weights / total).reshape(batch, heads, slots)


def _numbers(x: Array | QuantArray, like: Array) -> Array:
    # Levels of int8 are exact in bfloat16 and float32 alike.
    return x.values.astype(like.dtype) if isinstance(x, QuantArray) else x
