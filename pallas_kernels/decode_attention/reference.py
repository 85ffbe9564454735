"""Attention of one new token over the cache's slots, in plain XLA."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J S H"],
    v: Float[Array, "B J S H"],
    visible: Bool[Array, "B J S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B N H"]:
    """softmax(q kᵀ) v over the visible slots; logits, softmax and sums in float32.

    Args:
        q: the new token's queries; query head n reads head n // (N / J) of the cache.
        k: cached keys, the new token's among them.
        v: cached values.
        visible: True for slots that the query may look at. The others weigh 0 and may hold any
            finite number. A row that sees nothing gives zeros.
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.
    """
    grouped = q.reshape(*k.shape[:2], -1, q.shape[-1])  # [B, J, G, H]
    logits = scale * jnp.einsum("bjgh,bjsh->bjgs", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    out = jnp.einsum(
        "bjgs,bjsh->bjgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (out / jnp.where(total == 0.0, 1.0, total)).reshape(q.shape).astype(q.dtype)
