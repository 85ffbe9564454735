"""What kernels of `decode_attention` are compared with, and the inputs they get."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.quantized import QuantArray

CASES = tuple(spec for spec in SPECS if not spec.large)


def poisoned(spec, inputs):
    """The inputs with NaN in all slots that no query sees, those of other layers included."""
    q, k, v, visible = inputs
    start = spec.options["start"] or 0
    groups = np.asarray(visible).reshape(spec.batch, spec.cache_heads, -1, spec.slots)
    used = np.zeros(k.shape[:3], bool)
    used[:, :, start : start + spec.slots] = groups.any(2)

    def poison(x):
        if isinstance(x, QuantArray):
            return QuantArray(values=x.values, scale=jnp.asarray(np.where(used, x.scale, np.nan)))
        return jnp.asarray(np.where(used[..., None], x, np.nan).astype(x.dtype))

    return q, poison(k), poison(v), visible


def expected(spec, inputs):
    """Outputs and weights in float64, by NumPy."""
    q, k, v, visible = inputs
    start, group = spec.options["start"] or 0, spec.heads // spec.cache_heads

    def numbers(x):
        if isinstance(x, QuantArray):
            x = np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)[..., None]
        x = np.asarray(x, np.float64)[:, :, start : start + spec.slots]
        return np.repeat(x, group, axis=1)

    seen = np.asarray(visible)
    seen = np.repeat(seen, spec.heads // seen.shape[1], axis=1)
    logits = np.einsum("bnh,bnsh->bns", np.asarray(q, np.float64), numbers(k))
    logits *= spec.options["scale"]
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    numerators = np.where(seen, np.exp(logits), 0.0)
    weights = numerators / np.maximum(numerators.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bns,bnsh->bnh", weights, numbers(v)), weights
