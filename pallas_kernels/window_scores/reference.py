"""Windowed reconstruction scores in plain XLA: specification, fallback and oracle.

The window is the last W queries; query row w of W sits at key column T - W + w. Everything is
float32 inside, products too, which TPUs and GPUs would round to bfloat16 and TF32 by default. Two
habits keep the scores exact where float32 would not be:

* The distance ‖(o - v) W_O‖ is taken of a difference, never expanded into ‖o‖² - 2 o·v + ‖v‖².
* Only one key of a row can hold more than half of its weight. For that *dominant* key 1 - A and
  o - v both vanish as A -> 1, so they are summed over the other keys instead:
  A / (1 - A) · ‖o - v_n‖ = A · ‖o_without_n - v_n‖, with o_without_n the attention output that is
  left when key n is taken away.

Derivatives are finite: where a distance or a sum of weights is 0, theirs is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.varying import vary_like
from pallas_kernels.window_scores.arithmetic import (
    FLOAT32,
    at_least_tiny,
    divided,
    norm,
    product,
    root,
)
from pallas_kernels.window_scores.attention import (
    window_attention,
    window_outputs,
    window_visible,
)
from pallas_kernels.window_scores.form import ScoreForm


def window_scores(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"] | None,
    factor: Float[Array, "N H R"] | None,
    row_weights: Float[Array, " W"] | None,
    query_positions: Int[Array, "B W"],
    key_positions: Int[Array, "B M T"],
    weights: Float[Array, "B N W T"] | None = None,
    *,
    form: ScoreForm,
) -> Float[Array, "B N P"]:
    """See the public function; `weights` spares the attention, if it is at hand."""
    seen = window_visible(query_positions, key_positions, form.sliding_window)
    if weights is None:
        weights = window_attention(q, k, seen, scale=form.scale, softcap=form.softcap)
    if form.kind == "attention":
        past = weights[..., : form.past]
        return jnp.max(past, axis=2) if row_weights is None else over_queries(past, row_weights)
    assert v is not None
    assert factor is not None
    if form.kind == "per_query":
        return per_query_reconstruction(
            weights,
            v,
            factor,
            row_weights,
            relative=form.relative,
            power=form.power,
            past=form.past,
        )
    assert row_weights is not None
    averaged = over_queries(weights, row_weights)
    blind = jnp.sum(jnp.where(jnp.any(seen, axis=-1), 0.0, row_weights), axis=-1)
    return aggregated_reconstruction(
        averaged,
        v,
        factor,
        window=weights.shape[-1] - form.past,
        tau=form.tau,
        missing=jnp.repeat(blind, q.shape[1] // blind.shape[1], axis=1),
    )


def over_queries(
    x: Float[Array, "*B W T"], row_weights: Float[Array, " W"]
) -> Float[Array, "*B T"]:
    """Σ_t row_weights_t x_t, the window's queries averaged.

    One product for each head: on CPU a sum over this axis is slow, and a product for all of them
    transposes x.
    """
    rows = jnp.broadcast_to(row_weights, (*x.shape[:-2], 1, x.shape[-2]))
    return jnp.matmul(rows, x, precision=FLOAT32)[..., 0, :]


def output_factor(w_o: Float[Array, "N H D"]) -> Float[Array, "N H R"]:
    """A factor R per head with R Rᵀ = W_O W_Oᵀ, so that ‖x W_O‖ = ‖x R‖ for every x.

    R is the transposed triangular factor of W_Oᵀ = Q Rᵀ: no Gram matrix, hence no squared
    condition number. A `w_o` that is no wider than H is returned as it is.

    Args:
        w_o: output projection by head.

    Returns:
        [N, H, R] float32 with R = min(H, D).
    """
    w_o = w_o.astype(jnp.float32)
    if w_o.shape[-1] <= w_o.shape[-2]:
        return w_o
    return jnp.linalg.qr(w_o.mT, mode="r").mT


def aggregated_reconstruction(
    weights: Float[Array, "B N T"],
    v: Float[Array, "B K T H"],
    factor: Float[Array, "N H R"],
    *,
    window: int,
    tau: float = 1.0,
    missing: float | Float[Array, "B N"] = 0.0,
) -> Float[Array, "B N P"]:
    """Odds times distance of weights that were averaged over the window first (released form).

    With ā the averaged weights and P = T - W past keys,
        ō = Σ_{l < P} ā_l v_l,    I[n] = ā_n / (1 - ā_n) · ‖(ō - v_n) W_O‖^τ.
    ō leaves the window's own keys out and is not renormalised, as in the released code.

    Args:
        weights: ā over all T keys.
        v: values.
        factor: see `output_factor`.
        window: W, how many of the last keys are not scored.
        tau: τ.
        missing: 1 - Σ ā: what queries that see nothing weigh in the average, and keys that are
            there no more.

    Returns:
        I of the P past keys, finite for any weights.
    """
    columns = weights.shape[-1]
    past = columns - window
    dominant = jax.nn.one_hot(jnp.argmax(weights[..., :past], -1), columns, dtype=bool)
    others = jnp.sum(jnp.where(dominant, 0.0, weights), axis=-1)
    remaining = missing + others  # 1 - ā of the dominant key
    # From here on the window's own keys weigh nothing. A slice would copy the values.
    weights = jnp.where(jnp.arange(columns) < past, weights, 0.0)
    rest = jnp.where(dominant, 0.0, weights)
    output = window_outputs(weights, v)
    scores = weights / (1.0 - rest) * _distance(output, v, factor) ** tau

    without = window_outputs(divided(rest, remaining), v)
    weight = jnp.sum(jnp.where(dominant, weights, 0.0), axis=-1)
    gap = without - window_outputs(dominant.astype(jnp.float32), v)
    distance = norm(jnp.einsum("bnh,nhr->bnr", gap, factor, precision=FLOAT32))
    exact = weight * at_least_tiny(remaining) ** (tau - 1.0) * distance**tau
    return jnp.where(dominant, exact[..., None], scores)[..., :past]


def per_query_reconstruction(
    weights: Float[Array, "B N W T"],
    v: Float[Array, "B K T H"],
    factor: Float[Array, "N H R"],
    row_weights: Float[Array, " W"] | None,
    *,
    relative: bool = False,
    power: float = 1.0,
    past: int | None = None,
) -> Float[Array, "B N P"]:
    """Odds times distance of every query, then averaged over the window (Eq. 7 of the paper).

        I_t[n] = A_t[n] / (1 - A_t[n]) · ‖(o_t - v_n) W_O‖,    I[n] = Σ_t row_weights_t I_t[n]^p,
    where o_t sums over all keys that query t sees.

    Args:
        weights: A_t.
        v: values.
        factor: see `output_factor`.
        row_weights: weight of each query in the average; None takes the maximum over them.
        relative: divide I_t by ‖o_t W_O‖.
        power: p.
        past: P, how many of the first keys are scored; those before the window by default.

    Returns:
        I of the P past keys, finite for any weights.
    """
    group = weights.shape[1] // v.shape[1]
    if past is None:
        past = weights.shape[-1] - weights.shape[-2]

    def head(args: tuple[Array, Array, Array]) -> Array:
        a, r, kv_head = args  # [B, W, T], [H, R], []
        values = product(jnp.take(v, kv_head, axis=1).astype(jnp.float32), r)  # [B, T, R]
        dominant = jax.nn.one_hot(jnp.argmax(a, -1), a.shape[-1], dtype=bool)
        rest = jnp.where(dominant, 0.0, a)
        output = product(a, values)
        error = a / (1.0 - jnp.where(dominant, 0.0, a)) * _pairwise_distance(output, values)
        without = product(divided(rest, jnp.sum(rest, axis=-1)), values)
        gap = without - product(dominant.astype(jnp.float32), values)
        peak = jnp.max(a, axis=-1, keepdims=True)
        error = jnp.where(dominant, peak * norm(gap)[..., None], error)
        if relative:
            error = jnp.where(peak > 0.0, error / at_least_tiny(norm(output))[..., None], 0.0)
        error = error[..., :past] ** power
        if row_weights is None:
            return jnp.max(error, axis=1)
        return over_queries(error, row_weights)

    kv_heads = jnp.arange(weights.shape[1]) // group
    scores = jax.lax.map(head, (jnp.moveaxis(weights, 1, 0), factor, kv_heads))
    return jnp.moveaxis(scores, 0, 1)


def _distance(
    output: Float[Array, "B N H"], v: Float[Array, "B K P H"], factor: Float[Array, "N H R"]
) -> Float[Array, "B N P"]:
    """‖(o - v_l) R‖ for each head and key; one head's [P, R] at a time."""
    group = output.shape[1] // v.shape[1]

    def head(args: tuple[Array, Array, Array]) -> Array:
        o, r, kv_head = args
        return norm(product(o[:, None] - jnp.take(v, kv_head, axis=1), r))

    kv_heads = jnp.arange(output.shape[1]) // group
    return jnp.moveaxis(jax.lax.map(head, (jnp.moveaxis(output, 1, 0), factor, kv_heads)), 0, 1)


def _pairwise_distance(x: Float[Array, "B W R"], y: Float[Array, "B T R"]) -> Float[Array, "B W T"]:
    """‖x_w - y_t‖ by subtraction, one coordinate at a time: [W, T] is the largest array."""
    x_columns, y_columns = jnp.moveaxis(x, -1, 0), jnp.moveaxis(y, -1, 0)

    def add(total: Array, columns: tuple[Array, Array]) -> tuple[Array, None]:
        a, b = columns
        return total + jnp.square(a[:, :, None] - b[:, None, :]), None

    zero = jnp.zeros((*x.shape[:2], y.shape[1]), jnp.float32)
    return root(jax.lax.scan(add, vary_like(zero, x, y), (x_columns, y_columns), unroll=8)[0])
