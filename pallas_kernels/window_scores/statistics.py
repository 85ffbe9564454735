"""Between the two passes over the keys: outputs, and the exact score of the dominant key.

Everything here is of the size of the window, in plain XLA. Pass 1 keeps each row's largest
*scored* key apart from the sums over all others, so that 1 - A and o_without_n, which cancel if
taken of the whole, are exact however close to 1 its weight is (see `reference`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores.arithmetic import FLOAT32, TINY
from pallas_kernels.window_scores.form import ScoreForm


class RowStatistics(NamedTuple):
    """What pass 1 knows of each window query; weights are exp(logit - peak).

    Attributes:
        peak: largest logit, 0 where the row sees nothing.
        logit: of the dominant key, the largest one of the P scored keys; -inf if it sees none.
        column: of the dominant key, -1 if there is none.
        rest: sum of the weights of all other keys.
        value: value of the dominant key.
        others: sum of weight times value of the others; of the scored ones alone in the
            aggregated form.
    """

    peak: Float[Array, "B N W"]
    logit: Float[Array, "B N W"]
    column: Int[Array, "B N W"]
    rest: Float[Array, "B N W"]
    value: Float[Array, "B N W H"]
    others: Float[Array, "B N W H"]

    @property
    def dominant(self) -> Float[Array, "B N W"]:
        """Weight of the dominant key."""
        return jnp.exp(self.logit - self.peak)

    @property
    def per_total(self) -> Float[Array, "B N W"]:
        """1 over the sum of all weights; 0 where the row sees nothing."""
        total = self.dominant + self.rest
        return jnp.where(total > 0.0, 1.0 / jnp.where(total > 0.0, total, 1.0), 0.0)


class PassTwo(NamedTuple):
    """What pass 2 needs; X is W for the form by query, 1 for the aggregated one.

    Attributes:
        peak: see `RowStatistics`.
        per_total: see `RowStatistics`.
        output: [B, N, X, R] o_t R by query, or [B, N, X, H] ō aggregated; None for attention.
        column: of the keys whose score is `exact`.
        exact: their scores.
        per_norm: what other errors of the row are multiplied by, form by query only.
    """

    peak: Float[Array, "B N W"]
    per_total: Float[Array, "B N W"]
    output: Float[Array, "B N X E"] | None = None
    column: Int[Array, "B N X"] | None = None
    exact: Float[Array, "B N X"] | None = None
    per_norm: Float[Array, "B N X"] | None = None


def per_query_targets(
    rows: RowStatistics, factor: Float[Array, "N H R"], form: ScoreForm
) -> PassTwo:
    """Output and dominant key of every query."""
    weight = rows.dominant * rows.per_total
    output = weight[..., None] * rows.value + rows.per_total[..., None] * rows.others
    projected = project(output, factor)
    without = rows.others / jnp.maximum(rows.rest, TINY)[..., None]
    exact = weight * jnp.linalg.norm(project(without - rows.value, factor), axis=-1)
    per_norm = jnp.ones_like(exact)
    if form.relative:
        per_norm = 1.0 / jnp.maximum(jnp.linalg.norm(projected, axis=-1), TINY)
    return PassTwo(
        peak=rows.peak,
        per_total=rows.per_total,
        output=projected,
        column=rows.column,
        exact=(exact * per_norm) ** form.power,
        per_norm=per_norm,
    )


def aggregated_targets(
    rows: RowStatistics,
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    factor: Float[Array, "N H R"],
    row_weights: Float[Array, " W"],
    query_positions: Int[Array, "B W"],
    key_positions: Int[Array, "B M T"],
    form: ScoreForm,
) -> PassTwo:
    """Averaged output, and the one key per head that can hold more than half of the average.

    Such a key holds more than half of some row, so it is the dominant key of that row: only W
    candidates are weighed, by the logits that all rows give them.
    """
    batch, heads, window, size = q.shape
    # Weights of the candidates [B, N, C = W] in all rows.
    columns = jnp.maximum(rows.column, 0)
    flat = columns.reshape(batch, k.shape[1], -1)
    keys = jnp.take_along_axis(k, flat[..., None], axis=2).reshape(batch, heads, window, size)
    by_head = jnp.repeat(key_positions, heads // key_positions.shape[1], axis=1)
    at = jnp.take_along_axis(by_head, columns, axis=2)
    logits = form.scale * jnp.einsum(
        "bnwh,bnch->bnwc", q, keys, preferred_element_type=jnp.float32, precision=FLOAT32
    )
    if form.softcap is not None:
        logits = form.softcap * jnp.tanh(logits / form.softcap)
    distance = query_positions[:, None, :, None] - at[:, :, None]
    seen = (distance >= 0) & (at[:, :, None] >= 0)
    if form.sliding_window is not None:
        seen &= distance < form.sliding_window
    weights = jnp.where(seen, jnp.exp(logits - rows.peak[..., None]), 0.0)
    weights *= rows.per_total[..., None]
    # A row's own dominant key: its weight, and what is left of 1, as pass 1 knows them.
    own = (rows.column[..., None] == rows.column[:, :, None]) & (rows.column[..., None] >= 0)
    own_weight = (rows.dominant * rows.per_total)[..., None]
    weights = jnp.where(own, own_weight, weights)
    left = jnp.where(own, (rows.rest * rows.per_total)[..., None], 1.0 - weights)

    averaged = jnp.einsum("bnwc,w->bnc", weights, row_weights, precision=FLOAT32)
    averaged = jnp.where(rows.column >= 0, averaged, 0.0)
    best = jnp.argmax(averaged, axis=-1)[..., None]  # [B, N, 1]
    value = jnp.take_along_axis(rows.value, best[..., None], axis=2)  # [B, N, 1, H]
    weight, left, own = (
        jnp.take_along_axis(x, best[..., None], axis=3)[..., 0] for x in (weights, left, own)
    )  # [B, N, W] of the best candidate

    def mean(x: Array) -> Array:
        return jnp.einsum("bnwh,w->bnh", x, row_weights, precision=FLOAT32)[:, :, None]

    dominant = own_weight * rows.value
    others = rows.per_total[..., None] * rows.others
    output = mean(dominant + others)
    # The others' values: those of a row whose dominant key is another contain the best one's.
    without = mean(others + jnp.where(own[..., None], 0.0, dominant - weight[..., None] * value))
    remaining = jnp.einsum("bnw,w->bn", left, row_weights, precision=FLOAT32)[..., None]
    remaining = jnp.maximum(remaining, TINY)
    gap = jnp.linalg.norm(project(without / remaining[..., None] - value, factor), axis=-1)
    held = jnp.take_along_axis(averaged, best, axis=-1)
    return PassTwo(
        peak=rows.peak,
        per_total=rows.per_total,
        output=output,
        column=jnp.take_along_axis(rows.column, best, axis=-1),
        exact=held * remaining ** (form.tau - 1.0) * gap**form.tau,
    )


def project(x: Float[Array, "B N X H"], factor: Float[Array, "N H R"]) -> Float[Array, "B N X R"]:
    """By each head's factor, in float32."""
    return jnp.einsum("bnwh,nhr->bnwr", x, factor, precision=FLOAT32)
