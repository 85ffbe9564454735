"""Triton kernels of `kernel_gpu`. Static arguments in capitals are powers of two.

A list is a head of a row of the batch, of B · J: what is scored together.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What bits of scores are as numbers without a sign, in the order of the scores.
_SIGN = tl.constexpr(0x80000000)
_LEAST = tl.constexpr(0x00800000)  # of the scores above -inf
_INFINITY = tl.constexpr(2139095040)  # the bits of +inf
# An eighth of its part is counted in 8 bits of an int64, of so many scores at most.
_MOST = tl.constexpr(255)
_TWO_COUNTS = tl.constexpr(0x000000FF000000FF)


@triton.jit
def scores_of(importance_ptr, column, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of one row's scores at these columns, those of -inf beyond the end."""
    x = tl.load(importance_ptr + column, mask=column < columns, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # In the order of the floats, -0 and 0 the same.
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def count_eighths(  # type: ignore[no-untyped-def]
    importance_ptr, low, width, shift, columns: tl.constexpr, STEP: tl.constexpr
):
    """How many scores of one row lie in each eighth, 2^shift, of the `width` from `low` on.

    The counts of eighths 0 and 4, 1 and 5, 2 and 6, 3 and 7, each two in one int64.
    """
    of_0 = tl.zeros([], tl.int64)
    of_1 = tl.zeros([], tl.int64)
    of_2 = tl.zeros([], tl.int64)
    of_3 = tl.zeros([], tl.int64)
    for begin in range(0, columns, _MOST * STEP):
        counts = tl.zeros([STEP], tl.int64)
        for first in range(begin, tl.minimum(begin + _MOST * STEP, columns), STEP):
            bits = scores_of(importance_ptr, first + tl.arange(0, STEP), columns)
            number = bits.to(tl.uint32, bitcast=True) ^ _SIGN
            offset = number - low
            inside = (number >= low) & (offset < width)
            eighth = ((offset >> shift) & 7).to(tl.int64)
            counts += tl.where(inside, tl.full([STEP], 1, tl.int64) << (8 * eighth), 0)
        of_0 += tl.sum(counts & _TWO_COUNTS, axis=0)
        of_1 += tl.sum((counts >> 8) & _TWO_COUNTS, axis=0)
        of_2 += tl.sum((counts >> 16) & _TWO_COUNTS, axis=0)
        of_3 += tl.sum((counts >> 24) & _TWO_COUNTS, axis=0)
    return of_0, of_1, of_2, of_3


@triton.jit
def one_eighth(of_0, of_1, of_2, of_3, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of what `count_eighths` gives, the count of eighth i."""
    if i % 4 == 0:
        both = of_0
    elif i % 4 == 1:
        both = of_1
    elif i % 4 == 2:
        both = of_2
    else:
        both = of_3
    return ((both >> (32 * (i // 4))) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def threshold_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    importance_ptr,  # [B * J, T]
    budget_ptr,  # [B]
    # Outputs.
    limits_ptr,  # [B * J, 2] bits of the smallest score that stays, and how many at it stay
    above_ptr,  # [B * J, blocks] how many scores of the blocks before are above the threshold
    ties_ptr,  # [B * J, blocks] how many are at the threshold
    # Static; capitals are powers of two.
    heads: tl.constexpr,
    columns: tl.constexpr,
    blocks: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row of scores."""
    head = tl.program_id(0)
    importance_ptr += head.to(tl.int64) * columns
    STEP: tl.constexpr = PARTS * BLOCK
    low = tl.full([], _LEAST, tl.uint32)
    width = tl.full([], 0xFFFFFFFF, tl.uint32)  # up to the highest
    shift = tl.full([], 29, tl.uint32)
    wanted = tl.load(budget_ptr + head // heads)
    behind = tl.zeros([], tl.int32)
    # `wanted` or more scores are at least `low`, fewer lie behind `width`: so many.
    while (width > 1) & (wanted > 0):
        of_0, of_1, of_2, of_3 = count_eighths(importance_ptr, low, width, shift, columns, STEP)
        reached = behind
        for i in tl.static_range(8):
            reached += one_eighth(of_0, of_1, of_2, of_3, i)
        wanted = tl.minimum(wanted, reached)  # at first, of all scores
        digit = tl.zeros([], tl.uint32)
        from_digit = reached
        reached = behind
        for i in tl.static_range(8):
            before = reached
            reached += one_eighth(of_0, of_1, of_2, of_3, 7 - i)
            found = (before < wanted) & (reached >= wanted)
            digit = tl.where(found, 7 - i, digit).to(tl.uint32)
            from_digit = tl.where(found, reached, from_digit)
            behind = tl.where(found, before, behind)
        low += digit << shift
        # A threshold that `wanted` scores reach needs no more digits.
        width = tl.where(from_digit == wanted, 1, tl.full([], 1, tl.uint32) << shift).to(tl.uint32)
        shift = tl.where(shift > 3, shift - 3, 0).to(tl.uint32)
    threshold = tl.where(wanted > 0, (low ^ _SIGN).to(tl.int32, bitcast=True), _INFINITY + 1)
    above = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for first in range(0, columns, STEP):
        part = tl.arange(0, PARTS)
        bits = scores_of(
            importance_ptr,
            first + part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :],
            columns,
        )
        here = tl.sum((bits > threshold).to(tl.int32), axis=1)
        tied = tl.sum((bits == threshold).to(tl.int32), axis=1)
        block = first // BLOCK + part
        at = head * blocks + block
        tl.store(above_ptr + at, above + tl.cumsum(here, axis=0) - here, mask=block < blocks)
        tl.store(ties_ptr + at, ties + tl.cumsum(tied, axis=0) - tied, mask=block < blocks)
        above += tl.sum(here, axis=0)
        ties += tl.sum(tied, axis=0)
    tl.store(limits_ptr + 2 * head, threshold)
    tl.store(limits_ptr + 2 * head + 1, wanted - above)


@triton.jit
def cut_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    importance_ptr,  # [R, T]
    limits_ptr,  # as `threshold_kernel` left them
    ties_ptr,
    # Outputs.
    cuts_ptr,  # [R] the column behind the last score at the threshold that stays
    # Static; capitals are powers of two.
    columns: tl.constexpr,
    blocks: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row of scores."""
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(limits_ptr + 2 * row)
    allowed = tl.load(limits_ptr + 2 * row + 1)
    block = tl.arange(0, BLOCKS)
    before = tl.load(ties_ptr + row * blocks + block, mask=block < blocks, other=allowed)
    last = tl.maximum(tl.sum((before < allowed).to(tl.int32), axis=0) - 1, 0)
    column = last * BLOCK + tl.arange(0, BLOCK)
    bits = scores_of(importance_ptr + row * columns, column, columns)
    rank = tl.load(ties_ptr + row * blocks + last)
    rank += tl.cumsum((bits == threshold).to(tl.int32), axis=0)
    missing = tl.sum((rank < allowed).to(tl.int32), axis=0)
    tl.store(cuts_ptr + row, last * BLOCK + missing + 1)


@triton.jit
def move_rows(  # type: ignore[no-untyped-def]
    old_ptr, new_ptr, source, target, stays, size: tl.constexpr, SIZE: tl.constexpr
):
    """Entries of `size` numbers."""
    number = tl.arange(0, SIZE)
    moved = stays[:, None] & (number < size)[None, :]
    x = tl.load(old_ptr + source[:, None] * size + number[None, :], mask=moved)
    tl.store(new_ptr + target[:, None] * size + number[None, :], x, mask=moved)


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    importance_ptr,  # [B * J, T]
    limits_ptr,  # as `threshold_kernel` left them
    above_ptr,
    ties_ptr,
    k_ptr,  # [B * K, T, H]
    v_ptr,  # [B * K, T, H]
    places_ptr,  # [B * M, T]
    k_scale_ptr,  # [B * K, T]
    v_scale_ptr,  # [B * K, T]
    # Outputs, zeros where nothing is stored.
    new_k_ptr,  # [B * J, C, H]
    new_v_ptr,  # [B * J, C, H]
    new_places_ptr,  # [B * J, C] plus 1
    new_columns_ptr,  # [B * J, C] plus 1
    new_k_scale_ptr,  # [B * J, C]
    new_v_scale_ptr,  # [B * J, C]
    # Static; capitals are powers of two.
    heads: tl.constexpr,
    columns: tl.constexpr,
    blocks: tl.constexpr,
    capacity: tl.constexpr,
    kv_heads: tl.constexpr,
    place_heads: tl.constexpr,
    k_size: tl.constexpr,
    v_size: tl.constexpr,
    BLOCK: tl.constexpr,
    K_SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """One block of columns of one row of scores."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    bits = scores_of(importance_ptr + head * columns, column, columns)
    threshold = tl.load(limits_ptr + 2 * head)
    allowed = tl.load(limits_ptr + 2 * head + 1)
    ties_before = tl.load(ties_ptr + head * blocks + block)
    tied = (bits == threshold).to(tl.int32)
    first_ties = (tied != 0) & (ties_before + tl.cumsum(tied, axis=0) <= allowed)
    stays = (bits > threshold) | first_ties
    number = stays.to(tl.int32)
    if tl.sum(number, axis=0) > 0:
        filled = tl.load(above_ptr + head * blocks + block) + tl.minimum(ties_before, allowed)
        slot = head * capacity + filled + tl.cumsum(number, axis=0) - 1
        batch = head // heads
        source = (batch * kv_heads + head % heads // (heads // kv_heads)) * columns + column
        move_rows(k_ptr, new_k_ptr, source, slot, stays, k_size, K_SIZE)
        move_rows(v_ptr, new_v_ptr, source, slot, stays, v_size, V_SIZE)
        if QUANTIZED:
            scale = tl.load(k_scale_ptr + source, mask=stays)
            tl.store(new_k_scale_ptr + slot, scale, mask=stays)
            scale = tl.load(v_scale_ptr + source, mask=stays)
            tl.store(new_v_scale_ptr + slot, scale, mask=stays)
        place = (batch * place_heads + head % heads // (heads // place_heads)) * columns + column
        tl.store(new_places_ptr + slot, tl.load(places_ptr + place, mask=stays) + 1, mask=stays)
        tl.store(new_columns_ptr + slot, column + 1, mask=stays)
