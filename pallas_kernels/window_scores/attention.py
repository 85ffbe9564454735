"""Attention of the window's queries over all keys, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.window_scores.arithmetic import FLOAT32


def window_visible(
    query_positions: Int[Array, "B W"], key_positions: Int[Array, "B M T"], window: int | None
) -> Bool[Array, "B M W T"]:
    """True where a query may look: at filled columns up to its own position.

    Args:
        query_positions: negative for rows that see nothing.
        key_positions: negative for columns that hold no key.
        window: how many positions a query looks back at, its own among them; all if None.
    """
    distance = query_positions[:, None, :, None] - key_positions[:, :, None]
    seen = (distance >= 0) & (key_positions[:, :, None] >= 0)
    if window is not None:
        seen &= distance < window
    return seen


def window_logits(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    visible: Bool[Array, "B M W T"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B N W T"]:
    """Attention logits of the window's queries over all keys, float32, -inf where not visible.

    Args:
        q: the window's queries.
        k: all keys; query head n reads key head n // (N / K).
        visible: True where a query may look, for all heads (M = 1) or by key head (M = K).
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.
    """
    batch, heads, window, size = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, window, size)
    logits = scale * jnp.einsum(
        "bkgwh,bkth->bkgwt", grouped, k, precision=FLOAT32, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(visible[:, :, None], logits, -jnp.inf).reshape(batch, heads, window, -1)


def window_attention(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    visible: Bool[Array, "B M W T"],
    *,
    scale: float,
    softcap: float | None = None,
    log_sums: Float[Array, "B N W"] | None = None,
) -> Float[Array, "B N W T"]:
    """Softmax weights of the window's queries over all keys; rows that see nothing are 0.

    Arguments as of `window_logits`, and `log_sums` as of `window_scores`.
    """
    logits = window_logits(q, k, visible, scale=scale, softcap=softcap)
    if log_sums is not None:
        return jax.lax.optimization_barrier(jnp.exp(logits - log_sums[..., None]))
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Written once: without the barrier each of their readers divides them, and writes its own.
    return jax.lax.optimization_barrier(weights / jnp.where(total == 0.0, 1.0, total))


def window_outputs(
    weights: Float[Array, "B N *W T"], v: Float[Array, "B K T H"]
) -> Float[Array, "B N *W H"]:
    """Weighted sums of the values, o = A v, float32."""
    batch, heads, *rows, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, keys)
    out = jnp.einsum(
        "bkrt,bkth->bkrh", grouped, v, precision=FLOAT32, preferred_element_type=jnp.float32
    )
    return out.reshape(batch, heads, *rows, v.shape[-1])
