"""Attention of one new token over cache slots on GPU: Triton, split over the slots.

Importing this file needs Triton. Each program takes one cache head and one part of its slots
with all query heads that share it, and leaves a numerator, a peak and a total; a second launch
puts the parts together, which takes XLA two for a single row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.reference import softmax
from pallas_kernels.decode_attention.tiling import Tiling, gpu_tiling, power_of_two
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import triton_call
from pallas_kernels.triton_functions import soft_cap

# The fewest rows of a matrix product.
_ROWS = 16
# Numbers of the parts that a program loads at once.
_COMBINED = 4096


def decode_attention_triton(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    start: int | Int[Array, ""] | None = None,
    *,
    scale: float,
    softcap: float | None,
    weights: bool,
    tiling: Tiling | None = None,
    call: Callable[..., tuple[Array, ...]] = triton_call,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None]:
    """See `pallas_kernels.decode_attention.decode_attention`.

    `call` launches a kernel as `triton_call` does.
    """
    begin = jnp.asarray(0 if start is None else start, jnp.int32)[None]
    inputs, shapes, options = launch(
        q, k, v, visible, begin, scale=scale, softcap=softcap, weights=weights, tiling=tiling
    )
    sums, peaks, totals, logits = call(
        part_kernel, inputs, shapes, name="decode_attention", **options
    )
    parts = sums.shape[0]
    (out,) = call(
        combine_kernel,
        (sums, peaks, totals),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        name="decode_attention_parts",
        grid=(q.shape[0] * q.shape[1],),
        num_warps=4,
        num_stages=1,
        parts=parts,
        lists=q.shape[0] * q.shape[1],
        size=q.shape[2],
        PARTS=power_of_two(parts),
        STEP=min(power_of_two(parts), max(1, _COMBINED // options["SIZE"])),
        SIZE=options["SIZE"],
    )
    if not weights:
        return out, None
    numerators, total = softmax(logits)
    return out, numerators / total


def launch(
    q: Array,
    k: Array | QuantArray,
    v: Array | QuantArray,
    visible: Array,
    begin: Array,
    *,
    scale: float,
    softcap: float | None,
    weights: bool,
    tiling: Tiling | None,
) -> tuple[tuple[Array, ...], tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]:
    """The kernel's input arrays, its outputs' shapes, and its grid with the static arguments."""
    batch, heads, size = q.shape
    seen = visible.astype(jnp.int8)
    if isinstance(k, QuantArray) and isinstance(v, QuantArray):
        inputs = (q, k.values, v.values, seen, begin, k.scale, v.scale)
    else:
        assert not isinstance(k, QuantArray)
        assert not isinstance(v, QuantArray)
        inputs = (q, k, v, seen, begin, begin, begin)  # the last two are not read
    cache_heads, total_slots = k.shape[1:3]
    slots, group = visible.shape[2], heads // cache_heads
    if tiling is None:
        tiling = gpu_tiling(
            lists=batch * cache_heads,
            slots=slots,
            head_dim=size,
            itemsize=inputs[1].dtype.itemsize,
        )
    # Whole blocks in each part.
    part = -(-slots // (tiling.splits * tiling.block)) * tiling.block
    parts = -(-slots // part)
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = (
        number((parts, batch, heads, size)),
        number((parts, batch, heads)),
        number((parts, batch, heads)),
        number((batch, heads, slots) if weights else (1,)),
    )
    options = {
        "grid": (batch * cache_heads, parts),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "scale": float(scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "lists": batch * cache_heads,
        "slots": slots,
        "total_slots": total_slots,
        "group": group,
        "size": size,
        "marks": visible.shape[1] // cache_heads,
        "part": part,
        "BLOCK": tiling.block,
        "GROUP": max(_ROWS, power_of_two(group)),
        "SIZE": max(_ROWS, power_of_two(size)),
        "QUANTIZED": isinstance(k, QuantArray),
        "WEIGHTS": weights,
    }
    return inputs, shapes, options


@triton.jit
def part_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    q_ptr,  # [B * J, G, H]
    k_ptr,  # [B * J, T, H]
    v_ptr,  # [B * J, T, H]
    seen_ptr,  # [B * J, marks, S] int8
    begin_ptr,  # [1] int32, where the S slots begin among the T
    k_scale_ptr,  # [B * J, T]
    v_scale_ptr,  # [B * J, T]
    # Outputs.
    sum_ptr,  # [P, B * J, G, H]
    peak_ptr,  # [P, B * J, G]
    total_ptr,  # [P, B * J, G]
    logits_ptr,  # [B * J, G, S]
    # Static; capitals are powers of two.
    scale: tl.constexpr,
    softcap: tl.constexpr,
    lists: tl.constexpr,
    slots: tl.constexpr,
    total_slots: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    marks: tl.constexpr,
    part: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """One part of one cache head's slots."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * part
    row = tl.arange(0, GROUP)
    column = tl.arange(0, SIZE)
    is_row = row < group
    is_column = column < size
    at_q = (head * group + row)[:, None] * size + column[None, :]
    q = tl.load(q_ptr + at_q, mask=is_row[:, None] & is_column[None, :], other=0.0)
    base = head * total_slots + tl.load(begin_ptr)
    # A row of marks is shared by all query heads, or each has its own.
    mark = tl.where(is_row, row, 0) % marks
    sums = tl.zeros([GROUP, SIZE], tl.float32)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    for offset in range(0, part, BLOCK):
        slot = first + offset + tl.arange(0, BLOCK)
        inside = slot < slots
        at_seen = (head * marks + mark)[:, None] * slots + slot[None, :]
        seen = tl.load(seen_ptr + at_seen, mask=inside[None, :], other=0) != 0
        seen = seen & is_row[:, None]
        # Entries that nobody sees are not even read: whatever they hold counts as 0.
        used = tl.max(seen.to(tl.int32), axis=0) != 0
        at = (base + slot)[:, None] * size + column[None, :]
        wanted = used[:, None] & is_column[None, :]
        k = tl.load(k_ptr + at, mask=wanted, other=0.0).to(q.dtype)
        logits = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        if QUANTIZED:
            logits *= tl.load(k_scale_ptr + base + slot, mask=used, other=0.0)[None, :]
        logits = soft_cap(logits, softcap)
        logits = tl.where(seen, logits, float("-inf"))
        if WEIGHTS:
            at_logits = (head * group + row)[:, None] * slots + slot[None, :]
            tl.store(logits_ptr + at_logits, logits, mask=is_row[:, None] & inside[None, :])
        new = tl.maximum(peak, tl.max(logits, axis=1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp(peak - finite)
        weights = tl.exp(logits - finite[:, None])
        peak = new
        total = fade * total + tl.sum(weights, axis=1)
        if QUANTIZED:
            weights *= tl.load(v_scale_ptr + base + slot, mask=used, other=0.0)[None, :]
        v = tl.load(v_ptr + at, mask=wanted, other=0.0).to(q.dtype)
        sums = fade[:, None] * sums
        sums = tl.dot(weights.to(q.dtype), v, sums, input_precision="ieee")
    out = (tl.program_id(1) * lists + head) * group + row
    tl.store(
        sum_ptr + out[:, None] * size + column[None, :],
        sums,
        mask=is_row[:, None] & is_column[None, :],
    )
    tl.store(peak_ptr + out, peak, mask=is_row)
    tl.store(total_ptr + out, total, mask=is_row)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    sum_ptr,  # [P, B * N, H] numerators of each part relative to its own peak
    peak_ptr,  # [P, B * N] largest logits, -inf of an empty part
    total_ptr,  # [P, B * N] denominators relative to the peaks
    # Output.
    out_ptr,  # [B * N, H]
    # Static; capitals are powers of two.
    parts: tl.constexpr,
    lists: tl.constexpr,
    size: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One softmax-weighted mean of a query head from those of its parts; 0 if all are empty."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < parts
    peak = tl.max(tl.load(peak_ptr + part * lists + head, mask=inside, other=float("-inf")), axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    column = tl.arange(0, SIZE)
    is_column = column < size
    sums = tl.zeros([SIZE], tl.float32)
    total = 0.0
    for first in range(0, parts, STEP):
        part = first + tl.arange(0, STEP)
        inside = part < parts
        at = part * lists + head
        factor = tl.exp(tl.load(peak_ptr + at, mask=inside, other=float("-inf")) - peak)
        total += tl.sum(tl.load(total_ptr + at, mask=inside, other=0.0) * factor, axis=0)
        wanted = inside[:, None] & is_column[None, :]
        some = tl.load(sum_ptr + at[:, None] * size + column[None, :], mask=wanted, other=0.0)
        sums += tl.sum(some * factor[:, None], axis=0)
    mean = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * size + column, mean.to(out_ptr.dtype.element_ty), mask=is_column)
