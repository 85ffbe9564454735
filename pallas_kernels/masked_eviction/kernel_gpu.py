"""Eviction on a GPU: Triton kernels for a threshold search and for moving what stays.

Importing this file needs Triton. XLA's `top_k` sorts all columns with their indices. A radix sort
of 8 bits a pass reads and writes 8 bytes a column four times and counts digits before each pass,
80 bytes a column, then C indices are sorted again and gathered by. Here the threshold is found by
quartering the bits of the scores: 4 bytes a column for each of at most 16 steps, ended by the first
that meets the budget, about 10 for 131,072 distinct scores and a budget of 1,024. They are only
read, by one launch for all rows, from the L2 cache, where the scores of a layer fit (4 MiB for 8
heads of 128k), or the L1 cache where a row is as short as in decoding. One more reading finds where
each block's entries go, so that a second launch moves all blocks side by side; of keys and values
it reads only what stays. Predicted, not measured: 0.05 ms for 8 heads of 128k, in which 8
multiprocessors read 0.5 MiB each 10 times at 0.1 TB/s.

Triton through jax-triton and not Pallas: Pallas's Triton backend is deprecated since jax 0.11.2,
and Mosaic GPU has neither scans nor stores to computed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction.reference import Kept
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import triton_call

_BLOCK = 64  # columns that are moved at a time
_SEARCHED = 8192  # columns in a step of the search
_LOWEST = tl.constexpr(-2139095041)  # the bits of -inf, as `scores_of` has them
_HIGHEST = tl.constexpr(2139095040)  # those of +inf


def masked_eviction_triton(
    importance: Float[Array, "B J T"],
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    positions: Int[Array, "B M T"],
    budget: Int[Array, " B"],
    *,
    capacity: int,
    call: Callable[..., tuple[Array, ...]] = triton_call,
) -> Kept:
    """See the public function; `call` launches a kernel as `triton_call` does."""
    batch, heads, columns = importance.shape
    lists, blocks = batch * heads, -(-columns // _BLOCK)
    importance = importance.astype(jnp.float32)
    wanted = jnp.minimum(budget, min(capacity, columns)).astype(jnp.int32)
    limits, above, ties = _limits(importance.reshape(lists, columns), wanted, heads, call)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    static = {"heads": heads, "columns": columns, "blocks": blocks, "BLOCK": _BLOCK}
    quantized = isinstance(k, QuantArray)
    entries = [x.values if isinstance(x, QuantArray) else x for x in (k, v)]
    scales = [x.scale for x in (k, v) if isinstance(x, QuantArray)]
    slots = (batch, heads, capacity)
    new_k, new_v, places, kept_columns, *new_scales = call(
        move_kernel,
        (
            importance,
            limits,
            above,
            ties,
            *entries,
            positions.astype(jnp.int32),
            *(scales or (importance, importance)),  # these are not read
        ),
        (
            *(jax.ShapeDtypeStruct((*slots, x.shape[-1]), x.dtype) for x in entries),
            integers(slots),
            integers(slots),
            *(jax.ShapeDtypeStruct(slots if quantized else (1,), jnp.float32) for _ in range(2)),
        ),
        name="eviction_move",
        zeroed=range(6),
        grid=(blocks, lists),
        num_warps=4,
        num_stages=1,
        capacity=capacity,
        kv_heads=k.shape[1],
        place_heads=positions.shape[1],
        k_size=k.shape[-1],
        v_size=v.shape[-1],
        K_SIZE=triton.next_power_of_2(k.shape[-1]),
        V_SIZE=triton.next_power_of_2(v.shape[-1]),
        QUANTIZED=quantized,
        **static,
    )
    moved = [
        QuantArray(values=x, scale=scale) if quantized else x
        for x, scale in zip((new_k, new_v), new_scales, strict=True)
    ]
    # The rest was stored as one more than it is, as empty slots hold 0.
    return Kept(moved[0], moved[1], places - 1, kept_columns - 1)


def thresholds_triton(
    values: Float[Array, "R T"],
    counts: Int[Array, " R"],
    *,
    call: Callable[..., tuple[Array, ...]] = triton_call,
) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """Thresholds and cuts, as `search_thresholds` wants them; all values at least 0."""
    lists, columns = values.shape
    blocks = -(-columns // _BLOCK)
    limits, _, ties = _limits(values, counts, 1, call)
    (cuts,) = call(
        cut_kernel,
        (values, limits, ties),
        (jax.ShapeDtypeStruct((lists,), jnp.int32),),
        name="eviction_cut",
        grid=(lists,),
        num_warps=4,
        num_stages=1,
        columns=columns,
        blocks=blocks,
        BLOCK=_BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
    )
    return limits[:, 0], cuts


def _limits(
    importance: Float[Array, "R T"],
    budget: Int[Array, " B"],
    heads: int,
    call: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    """What `threshold_kernel` writes; R = B · heads."""
    lists, columns = importance.shape
    blocks = -(-columns // _BLOCK)
    parts = min(triton.next_power_of_2(blocks), _SEARCHED // _BLOCK)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return call(
        threshold_kernel,
        (importance, budget),
        (integers((lists, 2)), integers((lists, blocks)), integers((lists, blocks))),
        name="eviction_threshold",
        grid=(lists,),
        num_warps=max(4, parts * _BLOCK // 512),  # 16 scores for each thread
        num_stages=1,
        heads=heads,
        columns=columns,
        blocks=blocks,
        BLOCK=_BLOCK,
        PARTS=parts,
    )


@triton.jit
def scores_of(importance_ptr, column, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of one row's scores at these columns, those of -inf beyond the end."""
    x = tl.load(importance_ptr + column, mask=column < columns, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # In the order of the floats, -0 and 0 the same.
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def count_from(importance_ptr, a, b, c, columns: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many scores of one row have at least these bits, more than those of -inf: of three."""
    of_a = tl.zeros([STEP], tl.int32)
    of_b = tl.zeros([STEP], tl.int32)
    of_c = tl.zeros([STEP], tl.int32)
    for first in range(0, columns, STEP):
        bits = scores_of(importance_ptr, first + tl.arange(0, STEP), columns)
        of_a += (bits >= a.to(tl.int32)).to(tl.int32)
        of_b += (bits >= b.to(tl.int32)).to(tl.int32)
        of_c += (bits >= c.to(tl.int32)).to(tl.int32)
    return tl.sum(of_a, axis=0), tl.sum(of_b, axis=0), tl.sum(of_c, axis=0)


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
    # More than the bits of -inf; int64, as the difference of the ends needs 33 bits.
    low = tl.full([], _LOWEST + 1, tl.int64)
    high = tl.full([], _HIGHEST + 1, tl.int64)
    wanted = tl.load(budget_ptr + head // heads)
    tokens, _, _ = count_from(importance_ptr, low, low, low, columns, STEP)
    wanted = tl.minimum(wanted, tokens)
    # `wanted` or more scores are at least `low`, fewer at least `high`.
    low = tl.where(wanted == 0, high, low)
    while high - low > 1:
        quarter = (high - low + 3) // 4
        a = low + quarter
        b = tl.minimum(a + quarter, high - 1)
        c = tl.minimum(b + quarter, high - 1)
        of_a, of_b, of_c = count_from(importance_ptr, a, b, c, columns, STEP)
        end = tl.where(
            of_a < wanted, a, tl.where(of_b < wanted, b, tl.where(of_c < wanted, c, high))
        )
        low = tl.where(
            of_c >= wanted, c, tl.where(of_b >= wanted, b, tl.where(of_a >= wanted, a, low))
        )
        met = (of_a == wanted) | (of_b == wanted) | (of_c == wanted)  # then `low` meets it
        high = tl.where(met, low + 1, end)
    threshold = low.to(tl.int32)
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
