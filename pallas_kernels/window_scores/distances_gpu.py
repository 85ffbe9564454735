"""Triton kernel of `kernel_gpu` that reads values alone; lists and capitals as in `bodies_gpu`."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton_functions import load_entries


@triton.jit
def reconstruction_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    v_ptr,  # [lists, T, H]
    places_ptr,  # [B * place_heads, T]
    averaged_ptr,  # [lists, G, P]
    output_ptr,  # [lists, G, R]
    held_ptr,  # [lists, G] columns whose score is known
    exact_ptr,  # [lists, G] their scores
    factor_ptr,  # [PARTS, N, H, R]
    # Outputs.
    scores_ptr,  # [lists, G, P]
    # Static.
    kv_heads: tl.constexpr,
    place_heads: tl.constexpr,
    group: tl.constexpr,
    columns: tl.constexpr,
    past: tl.constexpr,
    size: tl.constexpr,
    rank: tl.constexpr,
    tau: tl.constexpr,
    precision: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
):
    """Pass 2 over the values: odds of averaged weights times ‖(ō - v) R‖^τ."""
    of = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    places_ptr += (of // kv_heads * place_heads + of % kv_heads % place_heads) * columns
    place = tl.load(places_ptr + column, mask=column < past, other=-1)
    v = load_entries(v_ptr, of * columns + column, place >= 0, size, SIZE)
    r = tl.arange(0, RANK)
    part = kv_heads * group * size * rank
    for g in range(group):
        head = of * group + g
        begin = (of % kv_heads * group + g) * size * rank
        averaged = tl.load(averaged_ptr + head * past + column, mask=column < past, other=0.0)
        squared = tl.zeros([KEYS], tl.float32)
        for first in range(0, rank, RANK):
            projected = project(v, factor_ptr, begin, first + r, part, size, rank, precision, PARTS)
            output = tl.load(output_ptr + head * rank + first + r, mask=first + r < rank, other=0.0)
            gap = output[None, :] - projected
            squared += tl.sum(gap * gap, axis=1)
        held = column == tl.load(held_ptr + head)
        odds = averaged / (1.0 - tl.where(held, 0.0, averaged))
        score = odds * to_power(tl.sqrt(squared), tau)
        score = tl.where(held, tl.load(exact_ptr + head), score)
        score = tl.where(averaged > 0.0, score, 0.0)
        tl.store(scores_ptr + head * past + column, score, mask=column < past)


@triton.jit
def project(  # type: ignore[no-untyped-def]
    v,  # [C, H]
    factor_ptr,  # [PARTS, N, H, R]
    begin,  # of the head's first part
    r,
    between: tl.constexpr,  # of a head's parts, numbers
    size: tl.constexpr,
    rank: tl.constexpr,
    precision: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Values by some columns r of a factor, in float32: [C, r]."""
    number = tl.arange(0, v.shape[1])
    inside = (number < size)[:, None] & (r < rank)[None, :]
    # From one pointer: 124 registers a thread, and two programs fit an SM; from the head's own 150.
    factor_ptr += begin + number[:, None] * rank + r[None, :]
    if PARTS == 1:
        factor = tl.load(factor_ptr, mask=inside, other=0.0)
        projected = tl.dot(v.to(tl.float32), factor, input_precision=precision)
    else:
        projected = tl.zeros([v.shape[0], r.shape[0]], tl.float32)
        for part in tl.static_range(PARTS):
            factor = tl.load(factor_ptr + part * between, mask=inside, other=0.0)
            projected = tl.dot(v, factor, projected)
    return projected


@triton.jit
def to_power(x, power: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of numbers of at least 0."""
    if power != 1.0:
        positive = x > 0.0
        x = tl.where(positive, tl.exp(power * tl.log(tl.where(positive, x, 1.0))), 0.0)
    return x
