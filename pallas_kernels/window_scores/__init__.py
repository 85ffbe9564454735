"""Attention of the last W queries, and what removing a key would do to it."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.triton_extra import run_triton, without_triton
from pallas_kernels.window_scores import kernel_tpu, reference
from pallas_kernels.window_scores.attention import (
    window_attention,
    window_logits,
    window_outputs,
    window_visible,
)
from pallas_kernels.window_scores.form import Kind, ScoreForm
from pallas_kernels.window_scores.reference import (
    aggregated_reconstruction,
    output_factor,
    over_queries,
    per_query_reconstruction,
)
from pallas_kernels.window_scores.tiling import Tiling, default_tiling

# Of the window and of a head, on GPU.
_MOST_ROWS = 64
_MOST_SIZE = 256

__all__ = [
    "Kind",
    "ScoreForm",
    "Tiling",
    "aggregated_reconstruction",
    "output_factor",
    "over_queries",
    "per_query_reconstruction",
    "window_attention",
    "window_logits",
    "window_outputs",
    "window_scores",
    "window_visible",
]


def window_scores(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"] | None,
    factor: Float[Array, "N H R"] | None,
    row_weights: Float[Array, " W"] | None,
    query_positions: Int[Array, "B W"],
    key_positions: Int[Array, "B M T"],
    *,
    form: ScoreForm,
    weights: Float[Array, "B N W T"] | None = None,
    log_sums: Float[Array, "B N W"] | None = None,
    implementation: Implementation | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "B N P"]:
    """Scores the first P keys by what the last W queries make of them; float32 throughout.

    With A_t the softmax weights of query t and r_t its row weight, `form.kind` selects
    "attention", Σ_t r_t A_t[n]; "aggregated", the reconstruction error of the averaged weights;
    or "per_query", the average of each query's error. See `aggregated_reconstruction` and
    `per_query_reconstruction` for the equations.

    The kernels read K and V twice, once for each group of query heads: first for the softmax
    statistics and outputs of the rows, then for the scores. They hold [G · W, block] numbers and
    write nothing of the size of the keys but the scores. Attention alone does not read V, and
    given `log_sums` reads K once. The outputs of the prompt's own attention are no substitute for
    the first pass: they are rounded to the model's type, and from a sum over all keys 1 - A and
    o - v of a key with nearly all weight cannot be recovered. On a GPU the kernels need
    jax-triton, windows of at most 64 queries and heads of at most 256 numbers; where a group has
    more rows than one program holds, programs side by side load the same keys.

    In the aggregated form the kernels take the key that may hold more than half of the average
    among those that lead a row, as any such key does lead one.

    Args:
        q: the window's queries.
        k: keys; query head n reads key head n // (N / K).
        v: values; not needed by attention.
        factor: see `output_factor`; not needed by attention.
        row_weights: at least 0, with sum 1 for the reconstruction errors. None takes the maximum
            over the queries, which the aggregated form does not have.
        query_positions: a query sees the keys up to its own position; a negative one sees none.
        key_positions: by key head, or one row for all (M = 1). Negative for columns that hold no
            key; the kernels let those hold NaN and score them 0.
        form: the static part.
        weights: what `window_attention` makes of these arguments, if it is at hand: the
            reference then spares it, the kernels have no use for it.
        log_sums: log of each row's sum of exp(logits) over all T keys, +inf for rows that see
            none, if known. Used by the kernels for attention only.
        implementation: see `dispatch`.
        tiling: of the kernels; by platform and shapes if None.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: the implementation that was named cannot run this.
    """
    arrays = (q, k, v, factor, row_weights, query_positions, key_positions)
    _validate(*arrays, form=form)

    def triton(*args: Any) -> Array:
        kernel = run_triton("window_scores", "window_scores_triton")
        return kernel(*args[:-2], args[-1], form=form, tiling=tiling)

    return dispatch(
        "window_scores",
        implementation,
        *arrays,
        weights,
        log_sums,
        reference=functools.partial(_by_reference, form=form),
        kernels=(
            Kernel(
                "pallas_tpu",
                functools.partial(_by_tpu, form=form, tiling=tiling),
                _refusal_tpu(q, k, form),
            ),
            Kernel("triton", triton, _refusal_triton(q, k, v, form)),
        ),
    )


def _by_reference(*args: Any, form: ScoreForm) -> Array:
    return reference.window_scores(*args[:-1], form=form)


def _by_tpu(*args: Any, form: ScoreForm, tiling: Tiling | None) -> Array:
    q, k, *_ = args
    if tiling is None:
        tiling = default_tiling(k.shape[2], q.shape[1] // k.shape[1] * q.shape[2])
    inputs = (*args[:-2], args[-1])  # all but the weights
    return kernel_tpu.window_scores(*inputs, form=form, tiling=tiling)


def _refusal_tpu(q: Array, k: Array, form: ScoreForm) -> str | None:
    if form.past == 0:
        return "there is nothing to score"
    if not {q.dtype, k.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"q and k are {q.dtype} and {k.dtype}, not float32 or bfloat16"
    return None


def _refusal_triton(q: Array, k: Array, v: Array | None, form: ScoreForm) -> str | None:
    if form.past == 0:
        return "there is nothing to score"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}, not float32, bfloat16 or float16"
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dtype, x.shape[-1]) != (q.dtype, q.shape[-1]):
            return f"{name} is {x.dtype} with heads of {x.shape[-1]}, other than q"
    if q.shape[2] > _MOST_ROWS or q.shape[3] > _MOST_SIZE:
        return f"a window of {q.shape[2]} or heads of {q.shape[3]} do not fit into registers"
    return without_triton("window_scores")


def _validate(
    q: Array,
    k: Array,
    v: Array | None,
    factor: Array | None,
    row_weights: Array | None,
    query_positions: Array,
    key_positions: Array,
    *,
    form: ScoreForm,
) -> None:
    batch, heads, window, size = q.shape
    kv_heads, columns = k.shape[1:3]
    if k.shape != (batch, kv_heads, columns, size) or heads % kv_heads:
        raise ValueError(
            "q, k: expected [B, N, W, H] and [B, K, T, H] with N a multiple of K, got "
            f"{q.shape} and {k.shape}"
        )
    if form.past > columns:
        raise ValueError(f"form.past: expected at most T = {columns}, got {form.past}")
    if row_weights is not None and row_weights.shape != (window,):
        raise ValueError(f"row_weights: expected [W] = [{window}], got {row_weights.shape}")
    if row_weights is None and form.kind == "aggregated":
        raise ValueError("row_weights: the aggregated form averages the rows, but they are None")
    if query_positions.shape != (batch, window):
        raise ValueError(
            f"query_positions: expected [B, W] = {(batch, window)}, got {query_positions.shape}"
        )
    if key_positions.shape not in ((batch, 1, columns), (batch, kv_heads, columns)):
        raise ValueError(
            f"key_positions: expected [B, 1 or K, T] = [{batch}, 1 or {kv_heads}, {columns}], got "
            f"{key_positions.shape}"
        )
    if form.kind == "attention":
        return
    if v is None or v.shape[:3] != k.shape[:3]:
        got = None if v is None else v.shape
        raise ValueError(f"v: expected [B, K, T, H] as k, {k.shape}, got {got}")
    if factor is None or factor.shape[:2] != (heads, v.shape[-1]):
        got = None if factor is None else factor.shape
        raise ValueError(f"factor: expected [N, H, R] = [{heads}, {v.shape[-1]}, R], got {got}")
