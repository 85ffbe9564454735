"""Smoothing of importance over time (the window's queries) and over space (positions)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masked_eviction import row_sum, top_mask

Temporal = Literal["ema", "mean", "inverse_ema", "last"]


def temporal_weights(kind: Temporal, window: int, alpha: float) -> Float[Array, " W"]:
    """Weights of the window's queries, oldest first; they sum to 1.

    Args:
        kind: "ema" is the exponential moving average of Eq. 8: acc ← row_0, then
            acc ← alpha · row_i + (1 - alpha) · acc, so that the oldest row starts the average and
            is not scaled by alpha. "inverse_ema" runs it from the newest row to the oldest,
            "mean" weighs all rows alike, "last" takes the newest alone.
        window: W.
        alpha: weight of the row that comes last into the average.
    """
    if kind == "mean":
        return jnp.full(window, 1.0 / window, jnp.float32)
    if kind == "last":
        return jnp.eye(window, dtype=jnp.float32)[-1]
    age = np.arange(window - 1, -1, -1, dtype=np.float64)
    weights = alpha * (1.0 - alpha) ** age
    weights[0] = (1.0 - alpha) ** (window - 1)
    return jnp.asarray(weights if kind == "ema" else weights[::-1], jnp.float32)


def average_pool(
    scores: Float[Array, "*B P"], valid: Bool[Array, "*B P"], kernel: int
) -> Float[Array, "*B P"]:
    """Mean over `kernel` neighbours; outside of the valid positions counts as 0."""
    return _pool(jnp.where(valid, scores, 0.0), kernel, 0.0, jnp.add) / kernel


def max_pool(
    scores: Float[Array, "*B P"], valid: Bool[Array, "*B P"], kernel: int
) -> Float[Array, "*B P"]:
    """Maximum over `kernel` neighbours that are valid."""
    return _pool(jnp.where(valid, scores, -jnp.inf), kernel, -jnp.inf, jnp.maximum)


def attention_drift(
    weights: Float[Array, "B N W T"], counts: Int[Array, " B"]
) -> Float[Array, "B N"]:
    """How far the window's attention moves: the adaptive window's input (Eq. 9).

    Of each query take the set of its `counts` most attended positions; the drift is the mean
    position of the older half's sets less that of the newer half's.

    Args:
        weights: window attention over all T columns, of two queries at least.
        counts: positions in each row's sets, from 1 to T.
    """
    *rows, columns = weights.shape
    half = rows[2] // 2
    counts = jnp.broadcast_to(counts[:, None, None], rows)
    # The shape in which `over_queries` multiplies them: in two shapes XLA:CPU writes them twice.
    merged = weights.reshape(-1, *weights.shape[2:])
    top = top_mask(merged, counts.reshape(merged.shape[:-1]))
    # Positions from the middle: their int32 sums stay small, and the drift is a difference.
    from_middle = jnp.arange(columns, dtype=jnp.int32) - columns // 2
    means = row_sum(jnp.where(top, from_middle, 0)).reshape(rows) / counts
    return jnp.mean(means[..., :half], axis=-1) - jnp.mean(means[..., half:], axis=-1)


def adaptive_window(
    drift: Float[Array, "*B"], *, kernel: int, scale: float
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """Kernel size and shift of each head (Eq. 10), with the released code's rounding.

    A drift of exactly 0 gives a shift of +1, and one of -m · scale a shift of 1 - m.

    Returns:
        kernel sizes max(kernel, 2 ⌊|drift| / scale⌋ + 1), and shifts.
    """
    steps = jnp.floor(jnp.abs(drift) / scale).astype(jnp.int32)
    signed = jnp.floor(drift / scale).astype(jnp.int32)
    return jnp.maximum(kernel, 2 * steps + 1), jnp.where(drift > 0, signed, signed + 1)


def adaptive_pool(
    scores: Float[Array, "B N P"],
    first: Int[Array, "B M"],
    kernels: Int[Array, "B N"],
    shifts: Int[Array, "B N"],
    *,
    max_kernel: int,
    max_shift: int,
) -> Float[Array, "B N P"]:
    """Mean over each head's own window of positions, the edge values repeated outside.

    pooled_l = mean over |j| <= kernel // 2 of score[l + shift + j].

    Args:
        scores: importance by position.
        first: first valid column, for all heads (M = 1) or by head; what lies before repeats it.
        kernels: odd window sizes, at most `max_kernel`.
        shifts: shifts, at most `max_shift` in size.
        max_kernel: static bound.
        max_shift: static bound.
    """
    past = scores.shape[-1]
    first = jnp.broadcast_to(first, scores.shape[:2])[..., None]
    edge = jnp.take_along_axis(scores, first, axis=-1)
    scores = jnp.where(jnp.arange(past) < first, edge, scores)
    padding = max_kernel // 2 + max_shift
    # Sums over 2^k neighbours, from k = 0 on; those that a head's width consists of follow each
    # other. No sum is the difference of two.
    sums = jnp.pad(scores, ((0, 0), (0, 0), (padding, padding)), mode="edge")
    begin = padding + shifts - kernels // 2
    total = jnp.zeros_like(scores)
    for k in range(max_kernel.bit_length()):
        here = (kernels >> k) % 2
        part = jax.vmap(jax.vmap(functools.partial(_cut, size=past)))(sums, begin)
        total += jnp.where(here[..., None] == 1, part, 0.0)
        begin += here << k
        sums = sums[..., : -(1 << k)] + sums[..., 1 << k :]
    return total / kernels[..., None]


def _cut(row: Float[Array, " T"], begin: Int[Array, ""], size: int) -> Float[Array, " P"]:
    return jax.lax.dynamic_slice_in_dim(row, begin, size)


def _pool(
    x: Float[Array, "*B P"], kernel: int, fill: float, combine: Callable[[Array, Array], Array]
) -> Float[Array, "*B P"]:
    half = kernel // 2
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], constant_values=fill)
    out = padded[..., : x.shape[-1]]
    for offset in range(1, kernel):
        out = combine(out, padded[..., offset : offset + x.shape[-1]])
    return out
