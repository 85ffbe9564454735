"""Triton kernels of `kernel_gpu` that read keys. Static arguments in capitals are powers of two.

A list is a key/value head of a row of the batch, of B · K. All its G query heads share its keys;
their rows are M = G · W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton_functions import load_entries, soft_cap
from pallas_kernels.window_scores.distances_gpu import project, to_power

_NO_COLUMN = tl.constexpr(2**31 - 1)  # larger than every column


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    q_ptr,  # [lists, M, H]
    k_ptr,  # [lists, T, H]
    v_ptr,  # [lists, T, H]
    rows_ptr,  # [B, W] positions of the queries
    places_ptr,  # [B * place_heads, T] positions of the keys
    # Outputs, of each part of the keys; weights are relative to the peak.
    peak_ptr,  # [P, lists, M] largest logit, -inf if the row sees nothing
    rest_ptr,  # [P, lists, M] sum of weights, of all but the dominant key if there are values
    top_ptr,  # [P, lists, M] logit of the dominant key
    column_ptr,  # [P, lists, M] where it is, -1 if there is none
    others_ptr,  # [P, lists, M, H] sum of weight times value of the others
    # Static.
    lists: tl.constexpr,
    kv_heads: tl.constexpr,
    place_heads: tl.constexpr,
    window: tl.constexpr,
    group_rows: tl.constexpr,
    columns: tl.constexpr,
    past: tl.constexpr,
    size: tl.constexpr,
    part: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    sliding_window: tl.constexpr,
    ONLY_PAST: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Pass 1: online softmax that keeps the largest scored key apart from the sums.

    Without values it is the softmax's statistics alone.
    """
    of = tl.program_id(2).to(tl.int64)
    batch = of // kv_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < group_rows
    number = tl.arange(0, SIZE)
    is_number = number < size
    q = load_entries(q_ptr, of * group_rows + row, is_row, size, SIZE)
    position = tl.load(rows_ptr + batch * window + row % window, mask=is_row, other=-1)
    places_ptr += (batch * place_heads + of % kv_heads % place_heads) * columns
    k_ptr += of * columns * size
    v_ptr += of * columns * size
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    top_column = tl.full([ROWS], -1, tl.int32)
    others = tl.zeros([ROWS, SIZE], tl.float32)
    for offset in range(0, part, KEYS):
        column = tl.program_id(1) * part + offset + tl.arange(0, KEYS)
        place = tl.load(places_ptr + column, mask=column < columns, other=-1)
        # Slots that hold no key are not even read.
        k = load_entries(k_ptr, column, place >= 0, size, SIZE)
        logits = visible_logits(
            q, k, position[:, None], place[None, :], scale, softcap, sliding_window
        )
        new = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp(peak - base)
        weights = tl.exp(logits - base[:, None])
        rest *= decay
        if VALUES:
            scored = (column < past)[None, :]
            candidates = tl.where(scored, logits, float("-inf"))
            best = tl.max(candidates, axis=1)
            better = best > top
            leads = (candidates == best[:, None]) & better[:, None]
            found = tl.min(tl.where(leads, column[None, :], _NO_COLUMN), axis=1)
            weights = tl.where(column[None, :] == found[:, None], 0.0, weights)
            # A key that is overtaken joins the others.
            demoted = tl.where(better, tl.exp(top - base), 0.0)
            rest += demoted
            overtaken = better & (top_column >= 0)
            old = load_entries(v_ptr, top_column, overtaken, size, SIZE)
            others = others * decay[:, None] + demoted[:, None] * old.to(tl.float32)
            v = load_entries(v_ptr, column, place >= 0, size, SIZE)
            others = add_weighted(weights, v, others, scored, ONLY_PAST)
            top = tl.maximum(top, best)
            top_column = tl.where(better, found, top_column)
        rest += tl.sum(weights, axis=1)
        peak = new
    at = (tl.program_id(1) * lists + of) * group_rows + row
    tl.store(peak_ptr + at, peak, mask=is_row)
    tl.store(rest_ptr + at, rest, mask=is_row)
    if VALUES:
        tl.store(top_ptr + at, top, mask=is_row)
        tl.store(column_ptr + at, top_column, mask=is_row)
        wanted = is_row[:, None] & is_number[None, :]
        tl.store(others_ptr + at[:, None] * size + number[None, :], others, mask=wanted)


@triton.jit
def scores_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    q_ptr,  # [lists, M, H]
    k_ptr,  # [lists, T, H]
    v_ptr,  # [lists, T, H]
    rows_ptr,  # [B, W]
    places_ptr,  # [B * place_heads, T]
    mean_ptr,  # [W] the rows' weights
    peak_ptr,  # [lists, M]
    per_total_ptr,  # [lists, M]
    # Of the form by query alone.
    output_ptr,  # [lists, M, R]
    held_ptr,  # [lists, M] columns whose score is known
    exact_ptr,  # [lists, M] their scores
    per_norm_ptr,  # [lists, M]
    factor_ptr,  # [PARTS, N, H, R]
    # Outputs.
    scores_ptr,  # [lists, G, P]
    # Static.
    kv_heads: tl.constexpr,
    place_heads: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    columns: tl.constexpr,
    past: tl.constexpr,
    size: tl.constexpr,
    rank: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    sliding_window: tl.constexpr,
    power: tl.constexpr,
    precision: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BY_QUERY: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
):
    """Pass 2 over the keys: one block of them, every query head that shares it.

    The rows' average of their weights, or of their errors.
    """
    of = tl.program_id(1).to(tl.int64)
    batch = of // kv_heads
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    places_ptr += (batch * place_heads + of % kv_heads % place_heads) * columns
    place = tl.load(places_ptr + column, mask=column < past, other=-1)
    k = load_entries(k_ptr, of * columns + column, place >= 0, size, SIZE)
    if BY_QUERY:
        v = load_entries(v_ptr, of * columns + column, place >= 0, size, SIZE)
    w = tl.arange(0, WINDOW)
    is_row = w < window
    position = tl.load(rows_ptr + batch * window + w, mask=is_row, other=-1)
    mean = tl.load(mean_ptr + w, mask=is_row, other=0.0)
    r = tl.arange(0, RANK)
    part = kv_heads * group * size * rank
    for g in range(group):
        head = of * group + g
        row = head * window + w
        q = load_entries(q_ptr, row, is_row, size, SIZE)
        logits = visible_logits(
            k, q, position[None, :], place[:, None], scale, softcap, sliding_window
        )
        peak = tl.load(peak_ptr + row, mask=is_row, other=0.0)
        per_total = tl.load(per_total_ptr + row, mask=is_row, other=0.0)
        values = tl.exp(logits - peak[None, :]) * per_total[None, :]  # [C, W]
        if BY_QUERY:
            distance = tl.zeros([KEYS, WINDOW], tl.float32)
            begin = (of % kv_heads * group + g) * size * rank
            for first in range(0, rank, RANK):
                projected = project(
                    v, factor_ptr, begin, first + r, part, size, rank, precision, PARTS
                )
                output = tl.load(
                    output_ptr + row[:, None] * rank + (first + r)[None, :],
                    mask=is_row[:, None] & (first + r < rank)[None, :],
                    other=0.0,
                )
                gaps = projected[:, None, :] - output[None, :, :]
                distance += tl.sum(gaps * gaps, axis=2)
            held = column[:, None] == tl.load(held_ptr + row, mask=is_row, other=-1)[None, :]
            odds = values / (1.0 - tl.where(held, 0.0, values))
            per_norm = tl.load(per_norm_ptr + row, mask=is_row, other=0.0)
            error = to_power(odds * tl.sqrt(distance) * per_norm[None, :], power)
            exact = tl.load(exact_ptr + row, mask=is_row, other=0.0)
            values = tl.where(values > 0.0, tl.where(held, exact[None, :], error), 0.0)
        score = tl.max(values, axis=1) if MAXIMUM else tl.sum(values * mean[None, :], axis=1)
        tl.store(scores_ptr + head * past + column, score, mask=column < past)


@triton.jit
def visible_logits(  # type: ignore[no-untyped-def]
    x,  # [X, H]
    y,  # [Y, H]
    row,  # positions of the queries, [X, 1] or [1, Y]
    place,  # of the keys, [1, Y] or [X, 1]
    scale: tl.constexpr,
    softcap: tl.constexpr,
    sliding_window: tl.constexpr,
):
    """[X, Y], -inf where the query does not see the key."""
    logits = soft_cap(scale * tl.dot(x, tl.trans(y), input_precision="ieee"), softcap)
    seen = (place >= 0) & (place <= row)
    if sliding_window > 0:
        seen = seen & (row - place < sliding_window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def add_weighted(weights, v, sums, scored, ONLY_PAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """`sums` and the product of `weights` and `v`, to float32."""
    if ONLY_PAST:
        weights = tl.where(scored, weights, 0.0)
    if v.dtype == tl.bfloat16:
        # Three of bfloat16 hold a float32, and their products are exact on tensor cores.
        for _ in tl.static_range(3):
            piece = weights.to(tl.bfloat16)
            sums = tl.dot(piece, v, sums)
            weights -= piece.to(tl.float32)
    else:
        sums = tl.dot(weights, v.to(tl.float32), sums, input_precision="ieee")
    return sums
