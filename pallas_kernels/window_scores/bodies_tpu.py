"""Kernel bodies of `kernel_tpu`: one block of keys against the M = G · W rows of a group.

References by name: q [M, H], k and v [C, H] with C keys a block, rows [M, 1] and places [1, C] the
positions of queries and keys, mean [W, 1] the rows' weights, factor [G, R, H]; peak, per_total,
logit, column, rest, exact, per_norm [M, 1] (aggregated: column, exact [G, 1]) and value, others,
output [M, H] as in `statistics`; scores [G, C].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.window_scores.form import ScoreForm

Ref = Any

_NO_COLUMN = 2**31 - 1  # larger than every column
_CHUNK = 8
_TRANSPOSED = ((1,), (1,)), ((), ())
_PLAIN = ((1,), (0,)), ((), ())


def sums_kernel(
    q: Ref, k: Ref, rows: Ref, places: Ref, peak: Ref, total: Ref, *, form: ScoreForm
) -> None:
    """Softmax statistics of every row, for scores that need no values."""

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        peak[...] = jnp.full(peak.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    logits = _logits(q, k, rows, places, form)
    new = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    sums = jnp.sum(jnp.exp(logits - base), axis=1, keepdims=True)
    total[...] = total[...] * jnp.exp(peak[...] - base) + sums
    peak[...] = new


def statistics_kernel(
    q: Ref,
    k: Ref,
    rows: Ref,
    places: Ref,
    v: Ref,
    peak: Ref,
    logit: Ref,
    column: Ref,
    rest: Ref,
    value: Ref,
    others: Ref,
    *,
    form: ScoreForm,
) -> None:
    """Pass 1: online softmax that keeps the largest scored key apart from the sums."""

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        for ref, fill in (
            (peak, -jnp.inf),
            (logit, -jnp.inf),
            (column, -1),
            (rest, 0.0),
            (value, 0.0),
            (others, 0.0),
        ):
            ref[...] = jnp.full(ref.shape, fill, ref.dtype)

    logits = _logits(q, k, rows, places, form)
    columns = _columns(logits.shape)
    scored = columns < form.past
    candidates = jnp.where(scored, logits, -jnp.inf)
    best = jnp.max(candidates, axis=1, keepdims=True)
    better = best > logit[...]
    first = jnp.min(
        jnp.where((candidates == best) & better, columns, _NO_COLUMN), axis=1, keepdims=True
    )
    taken = columns == first

    new = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.where(taken, 0.0, jnp.exp(logits - base))
    decay = jnp.exp(peak[...] - base)
    # A key that is overtaken joins the others.
    demoted = jnp.where(better, jnp.exp(logit[...] - base), 0.0)
    rest[...] = rest[...] * decay + jnp.sum(weights, axis=1, keepdims=True) + demoted
    values = _only_valid(v[...].astype(jnp.float32), places[...])
    if form.kind == "aggregated":
        weights = jnp.where(scored, weights, 0.0)
    others[...] = others[...] * decay + _dot(weights, values, _PLAIN) + demoted * value[...]
    overtaking = _dot(taken.astype(jnp.float32), values, _PLAIN)
    value[...] = jnp.where(better, overtaking, value[...])
    column[...] = jnp.where(better, first, column[...])
    logit[...] = jnp.maximum(logit[...], best)
    peak[...] = new


def attention_kernel(
    q: Ref,
    k: Ref,
    rows: Ref,
    places: Ref,
    peak: Ref,
    per_total: Ref,
    mean: Ref,
    scores: Ref,
    *,
    form: ScoreForm,
    maximum: bool,
    group: int,
) -> None:
    """Pass 2: Σ_w mean_w A_w, or max_w A_w."""
    weights = _weights(q, k, rows, places, peak, per_total, form)
    for g in range(group):
        scores[g : g + 1] = _over_rows(_of_head(weights, g, group), mean, maximum)


def aggregated_kernel(
    q: Ref,
    k: Ref,
    rows: Ref,
    places: Ref,
    peak: Ref,
    per_total: Ref,
    output: Ref,
    column: Ref,
    exact: Ref,
    mean: Ref,
    factor: Ref,
    v: Ref,
    scores: Ref,
    *,
    form: ScoreForm,
    maximum: bool,
    group: int,
) -> None:
    """Pass 2: odds of the averaged weights times ‖(ō - v) R‖^τ."""
    weights = _weights(q, k, rows, places, peak, per_total, form)
    values = v[...].astype(jnp.float32)
    for g in range(group):
        averaged = _over_rows(_of_head(weights, g, group), mean, maximum)  # [1, C]
        gap = _dot(factor[g], output[g : g + 1] - values, _TRANSPOSED)  # [R, C]
        distance = jnp.sqrt(jnp.sum(jnp.square(gap), axis=0, keepdims=True))
        held = _columns(averaged.shape) == column[g : g + 1]
        odds = averaged / (1.0 - jnp.where(held, 0.0, averaged))
        score = jnp.where(held, exact[g : g + 1], odds * _power(distance, form.tau))
        scores[g : g + 1] = jnp.where(averaged > 0.0, score, 0.0)


def per_query_kernel(
    q: Ref,
    k: Ref,
    rows: Ref,
    places: Ref,
    peak: Ref,
    per_total: Ref,
    output: Ref,
    column: Ref,
    exact: Ref,
    per_norm: Ref,
    mean: Ref,
    factor: Ref,
    v: Ref,
    scores: Ref,
    projected: Ref,
    *,
    form: ScoreForm,
    maximum: bool,
    group: int,
) -> None:
    """Pass 2: odds times ‖o_t R - v R‖ of every row. `projected` is scratch, [R, C]."""
    weights = _weights(q, k, rows, places, peak, per_total, form)
    values = v[...].astype(jnp.float32)
    for g in range(group):
        of = slice(g * mean.shape[0], (g + 1) * mean.shape[0])
        a = _of_head(weights, g, group)
        projected[...] = _dot(factor[g], values, _TRANSPOSED)
        distance = _pairwise_distance(output[of], projected)
        held = _columns(a.shape) == column[of]
        odds = a / (1.0 - jnp.where(held, 0.0, a))
        error = _power(odds * distance * per_norm[of], form.power)
        error = jnp.where(held, exact[of], error)
        scores[g : g + 1] = _over_rows(jnp.where(a > 0.0, error, 0.0), mean, maximum)


def _logits(q: Ref, k: Ref, rows: Ref, places: Ref, form: ScoreForm) -> Float[Array, "M C"]:
    logits = _dot(q[...], k[...], _TRANSPOSED) * form.scale
    if form.softcap is not None:
        logits = form.softcap * jnp.tanh(logits / form.softcap)
    return jnp.where(_seen(rows[...], places[...], form), logits, -jnp.inf)


def _seen(
    rows: Int[Array, "M 1"], places: Int[Array, "1 C"], form: ScoreForm
) -> Bool[Array, "M C"]:
    seen = (places >= 0) & (places <= rows)
    if form.sliding_window is not None:
        seen &= rows - places < form.sliding_window
    return seen


def _weights(
    q: Ref, k: Ref, rows: Ref, places: Ref, peak: Ref, per_total: Ref, form: ScoreForm
) -> Float[Array, "M C"]:
    return jnp.exp(_logits(q, k, rows, places, form) - peak[...]) * per_total[...]


def _of_head(x: Float[Array, "M C"], g: int, group: int) -> Float[Array, "W C"]:
    window = x.shape[0] // group
    return x[g * window : (g + 1) * window]


def _over_rows(x: Float[Array, "W C"], mean: Ref, maximum: bool) -> Float[Array, "1 C"]:
    if maximum:
        return jnp.max(x, axis=0, keepdims=True)
    return jnp.sum(x * mean[...], axis=0, keepdims=True)


def _columns(shape: tuple[int, ...]) -> Int[Array, "X C"]:
    return pl.program_id(2) * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _only_valid(v: Float[Array, "C H"], places: Int[Array, "1 C"]) -> Float[Array, "C H"]:
    # Unused slots and what lies beyond the end may hold NaN, which no weight of 0 removes.
    valid = jnp.broadcast_to((places >= 0).astype(jnp.float32), (128, places.shape[1])).T[:, :1]
    return jnp.where(valid > 0.0, v, 0.0)


def _pairwise_distance(output: Float[Array, "W R"], values: Ref) -> Float[Array, "W C"]:
    """‖output_w - values_c‖ by subtraction, `values` [R, C]: [W, C] is the largest array."""
    width = output.shape[1]
    lanes = jax.lax.broadcasted_iota(jnp.int32, output.shape, 1)

    def add(i: Array, total: Float[Array, "W C"]) -> Float[Array, "W C"]:
        chunk = values[pl.ds(pl.multiple_of(i * _CHUNK, _CHUNK), _CHUNK), :]
        for r in range(_CHUNK):
            one = jnp.where(lanes == i * _CHUNK + r, output, 0.0)
            coordinate = jnp.sum(one, axis=1, keepdims=True)  # [W, 1]
            total += jnp.square(coordinate - chunk[r : r + 1])
        return total

    start = jnp.zeros((output.shape[0], values.shape[1]), jnp.float32)
    return jnp.sqrt(jax.lax.fori_loop(0, width // _CHUNK, add, start))


def _power(x: Float[Array, "X C"], power: float) -> Float[Array, "X C"]:
    if power == 1.0:
        return x
    return jnp.where(x > 0.0, jnp.exp(power * jnp.log(jnp.where(x > 0.0, x, 1.0))), 0.0)


def _dot(x: Array, y: Array, contract: Any) -> Float[Array, "X Y"]:
    # Float32 in full; products of bfloat16 are exact in one pass.
    exact = x.dtype == jnp.float32 or y.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, contract, precision=precision, preferred_element_type=jnp.float32
    )
