"""The oracle of cached decoding: no cache at all, full attention with a mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def dense_attend(model, allowed=None):
    """An `attend` over the whole sequence; `allowed[layer]` bool [B, N, T, T] narrows it."""

    def attend(layer, q, k, v, w_o, state):
        spec = model.layer_specs[layer]
        length = q.shape[1]
        k, v = (jnp.repeat(x, spec.group_size, axis=2) for x in (k, v))
        logits = spec.scale * jnp.einsum("bqnh,bknh->bnqk", q, k)
        if spec.softcap is not None:
            logits = spec.softcap * jnp.tanh(logits / spec.softcap)
        distance = jnp.arange(length)[:, None] - jnp.arange(length)
        seen = distance >= 0
        if spec.window is not None:
            seen &= distance < spec.window
        if allowed is not None:
            seen = seen & allowed[layer]
        logits = jnp.where(seen, logits, -jnp.inf)
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits, -1), v), state

    return attend


def logits_of(model, tokens, allowed=None):
    """Logits [T, V] at all positions of one row.

    It is padded behind its end, which is not seen from before it: few lengths, few programs.
    """
    length = len(tokens)
    padding = (0, -length % 64)
    if allowed is not None:
        around = ((0, 0), (0, 0), padding, padding)
        allowed = tuple(np.pad(mask, around, constant_values=True) for mask in allowed)
    return np.asarray(_logits(model, np.pad(tokens, padding)[None], allowed))[:length]


@jax.jit
def _logits(model, tokens, allowed):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = model(tokens, positions, dense_attend(model, allowed), None)
    return model.unembed(hidden)[0]
