"""The Triton kernels of `decode_attention`. Importing this file needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton_functions import soft_cap


@triton.jit
def part_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    q_ptr,  # [B * J, G, H]
    query_ptr,  # [B] int32 positions of the queries
    begin_ptr,  # [1] int32, where the S slots begin among the T
    owners_ptr,  # [B * J, T] int32
    slot_ptr,  # [B] int32, where new entries go among the T
    new_k_ptr,  # [B * J, H]
    new_v_ptr,  # [B * J, H]
    new_k_scale_ptr,  # [B * J]
    new_v_scale_ptr,  # [B * J]
    k_ptr,  # [B * J, T, H], this one and all that follow written to
    v_ptr,  # [B * J, T, H]
    positions_ptr,  # [B * J, T] int32
    k_scale_ptr,  # [B * J, T]
    v_scale_ptr,  # [B * J, T]
    # Outputs.
    sum_ptr,  # [P, B * J, G, H]
    peak_ptr,  # [P, B * J, G]
    total_ptr,  # [P, B * J, G]
    logits_ptr,  # [B * J, G, S]
    # The cache's arrays again, or None.
    _k_ptr,
    _v_ptr,
    _positions_ptr,
    _k_scale_ptr,
    _v_scale_ptr,
    # Static; capitals are powers of two.
    scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    lists: tl.constexpr,
    heads: tl.constexpr,
    slots: tl.constexpr,
    total_slots: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    per_set: tl.constexpr,
    part: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    OWNED: tl.constexpr,
    APPENDED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """One part of one cache head's slots.

    The program whose part a new entry goes to begins its softmax with it, as it is given, and
    writes it; padding writes it only. Nobody reads the slot that it goes to.
    """
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * part
    row = tl.arange(0, GROUP)
    column = tl.arange(0, SIZE)
    is_row = row < group
    is_column = column < size
    at_q = (head * group + row)[:, None] * size + column[None, :]
    q = tl.load(q_ptr + at_q, mask=is_row[:, None] & is_column[None, :], other=0.0)
    query = tl.load(query_ptr + head // heads)
    begin = tl.load(begin_ptr)
    base = head * total_slots + begin
    sums = tl.zeros([GROUP, SIZE], tl.float32)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    appended = -1
    if APPENDED:
        appended = tl.load(slot_ptr + head // heads) - begin
        here = (appended >= first) & (appended < first + part) & (appended < slots)
        sees = here & (query >= 0)
        target = base + appended
        given = column < tl.where(here, size, 0)
        key = tl.load(new_k_ptr + head * size + column, mask=given, other=0.0)
        value = tl.load(new_v_ptr + head * size + column, mask=given, other=0.0)
        tl.store(k_ptr + target * size + column, key, mask=given)
        tl.store(v_ptr + target * size + column, value, mask=given)
        tl.store(positions_ptr + target, query, mask=here)
        product = scale * tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1)
        sums += tl.where(sees, value.to(tl.float32), 0.0)[None, :]
        if QUANTIZED:
            key_scale = tl.load(new_k_scale_ptr + head)
            value_scale = tl.load(new_v_scale_ptr + head)
            tl.store(k_scale_ptr + target, key_scale, mask=here)
            tl.store(v_scale_ptr + target, value_scale, mask=here)
            product *= key_scale
            sums *= tl.where(sees, value_scale, 0.0)
        peak = tl.where(sees, soft_cap(product, softcap), float("-inf"))
        total += tl.where(sees, 1.0, 0.0)
    own = peak
    for offset in range(0, part, BLOCK):
        slot = first + offset + tl.arange(0, BLOCK)
        inside = (slot < slots) & (slot != appended)
        place = tl.load(positions_ptr + base + slot, mask=inside, other=-1)
        # Entries that nobody sees are not even read: whatever they hold counts as 0.
        used = (place >= 0) & (place <= query)
        if window > 0:
            used = used & (query - place < window)
        seen = used[None, :] & is_row[:, None]
        if OWNED:
            owner = tl.load(owners_ptr + base + slot, mask=used, other=-1)
            seen = seen & (owner[None, :] == (row // per_set)[:, None])
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
            found = tl.where((slot == appended)[None, :], own[:, None], logits)
            is_slot = is_row[:, None] & (slot < slots)[None, :]
            tl.store(logits_ptr + at_logits, found, mask=is_slot)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(peak - finite)
        weights = tl.exp(logits - finite[:, None])
        peak = higher
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
