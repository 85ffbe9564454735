"""What kernels of `decode_attention` are compared with, and the inputs they get."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import NewEntry
from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.quantized import QuantArray

CASES = tuple(spec for spec in SPECS if not spec.large)
# Lists with owners are not appended to.
APPENDED = tuple(spec for spec in CASES if spec.sets == 1)


def seen_by_query_head(spec, inputs):
    """[B, N, T] which entries a query head sees, one by one; only those of the layer's slots."""
    positions, query, owners = (None if x is None else np.asarray(x) for x in inputs[3:])
    seen = np.zeros((spec.batch, spec.heads, positions.shape[2]), bool)
    start, group = spec.options["start"] or 0, spec.heads // spec.cache_heads
    for b, n in np.ndindex(spec.batch, spec.heads):
        for t in range(start, start + spec.slots):
            j, at = n // group, query[b]
            place = positions[b, j, t]
            near = spec.window is None or place > at - spec.window
            mine = owners is None or owners[b, j, t] == n % group * spec.sets // group
            seen[b, n, t] = 0 <= place <= at and near and mine
    return seen


def poisoned(spec, inputs, new=None):
    """The inputs with NaN in all slots that no query sees, and in those that are written to."""
    q, k, v, positions, *rest = inputs
    used = seen_by_query_head(spec, inputs).reshape(spec.batch, spec.cache_heads, -1, k.shape[2])
    used = used.any(2)
    if new is not None:
        for b, slot in enumerate(np.asarray(new.slot)):
            used[b, :, slot : slot + 1] = False

    def poison(x):
        if isinstance(x, QuantArray):
            return QuantArray(values=x.values, scale=jnp.asarray(np.where(used, x.scale, np.nan)))
        return jnp.asarray(np.where(used[..., None], x, np.nan).astype(x.dtype))

    return q, poison(k), poison(v), positions, *rest


def appended(inputs, new):
    """The inputs with the new entries in them, written one by one."""
    q, *cache, query, owners = inputs

    def put(x, entry):
        x = np.array(x)
        for b, slot in enumerate(np.asarray(new.slot)):
            if slot < x.shape[2]:
                x[b, :, slot] = np.asarray(entry)[b]
        return jnp.asarray(x)

    def stored(x, entry):
        if isinstance(x, QuantArray):
            return QuantArray(values=put(x.values, entry.values), scale=put(x.scale, entry.scale))
        return put(x, entry)

    k, v = map(stored, cache[:2], (new.k, new.v))
    return q, k, v, put(cache[2], query), query, owners


def first_row_padded(spec, dtype):
    """Inputs whose first query is padding, new entries, and these with NaN in the first row."""
    *arrays, query, owners = spec.inputs(dtype)
    new = spec.new(dtype)

    def poison(x):
        if isinstance(x, QuantArray):
            return QuantArray(values=x.values, scale=poison(x.scale))
        return x.at[0].set(jnp.nan)

    unseen = NewEntry(k=poison(new.k), v=poison(new.v), slot=new.slot)
    return (*arrays, query.at[0].set(-1), owners), new, unseen


def expected(spec, inputs):
    """Outputs and weights in float64, by NumPy."""
    q, k, v = inputs[:3]
    start, group = spec.options["start"] or 0, spec.heads // spec.cache_heads
    layer = slice(start, start + spec.slots)

    def numbers(x):
        if isinstance(x, QuantArray):
            x = np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)[..., None]
        return np.repeat(np.asarray(x, np.float64)[:, :, layer], group, axis=1)

    seen = seen_by_query_head(spec, inputs)[:, :, layer]
    logits = np.einsum("bnh,bnsh->bns", np.asarray(q, np.float64), numbers(k))
    logits *= spec.options["scale"]
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    numerators = np.where(seen, np.exp(logits), 0.0)
    weights = numerators / np.maximum(numerators.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bns,bnsh->bnh", weights, numbers(v)), weights


def assert_written(cache, inputs, new):
    """The arrays of the cache, bit by bit; what they held besides may be NaN."""
    for one, other in zip(
        jax.tree.leaves(cache), jax.tree.leaves(appended(inputs, new)[1:4]), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(*(np.asarray(x, np.float64) for x in (one, other)))
