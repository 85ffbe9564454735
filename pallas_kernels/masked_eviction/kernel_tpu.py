"""Eviction on a TPU: a threshold search over the scores, then one pass that moves what stays.

Mosaic has neither sorting nor gathering. The k-th largest score is found by bisection on its
bits. Kept entries of a block are moved to its front by a product with a one-hot matrix, which is
exact, and stored behind those of the blocks before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masked_eviction.reference import Kept
from pallas_kernels.quantized import QuantArray
from pallas_kernels.varying import outputs_like

Ref = Any

_LANES = 128
_BLOCK = 256  # columns that are moved at a time
_ROWS = 8  # of a register; what is stored begins at a multiple of it
_SIDE = 8  # numbers of an entry besides its key and value
_STORED = _BLOCK + _ROWS
_VMEM = 12 * 2**20


def refusal(k: Array | QuantArray, v: Array | QuantArray, capacity: int) -> str | None:
    """Why the kernel does not take these, or None."""
    size = 0
    for x in (k, v):
        dtype = (x.values if isinstance(x, QuantArray) else x).dtype
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
            return f"entries are {dtype}, not float32, bfloat16 or int8"
        size += x.shape[-1] * (4 * (capacity + _STORED) + 2 * capacity * dtype.itemsize)
    if size > _VMEM:
        return f"{capacity} slots of a head need {size} bytes of VMEM, more than {_VMEM}"
    if capacity == 0 or k.shape[2] >= 2**24:
        return "float32 counts from 1 to 2**24 columns, and at least one slot"
    return None


def masked_eviction(
    importance: Float[Array, "B J T"],
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    positions: Int[Array, "B M T"],
    budget: Int[Array, " B"],
    *,
    capacity: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> Kept:
    """See the public function."""
    batch, heads, columns = importance.shape
    widths = ((0, 0), (0, 0), (0, -columns % _BLOCK))
    importance = jnp.pad(importance.astype(jnp.float32), widths, constant_values=-jnp.inf)
    budget = jnp.minimum(budget, min(capacity, columns)).astype(jnp.int32)
    limits = _limits(importance, budget, interpret)

    entries = [x.values if isinstance(x, QuantArray) else x for x in (k, v)]
    rows = [positions.astype(jnp.float32) + 1.0]
    rows += [x.scale for x in (k, v) if isinstance(x, QuantArray)]
    rows = [importance[:, :, None], *(jnp.pad(x, widths)[:, :, None] for x in rows)]

    def of_head(x: Array, shape: Sequence[int], *, by_row: bool) -> pl.BlockSpec:
        shared = heads // x.shape[1]  # heads that read the same
        if by_row:
            return pl.BlockSpec((None, None, *shape), lambda b, j, i: (b, j // shared, 0, i))
        return pl.BlockSpec((None, None, *shape), lambda b, j, i: (b, j // shared, i, 0))

    def whole(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, capacity, width), lambda b, j, _: (b, j, 0, 0))

    slots = -(-capacity // _ROWS) * _ROWS
    sizes = [(x.shape[-1], x.dtype) for x in entries] + [(_SIDE, jnp.dtype(jnp.float32))]
    outputs = [jax.ShapeDtypeStruct((batch, heads, capacity, n), dtype) for n, dtype in sizes]
    new_k, new_v, side = pl.pallas_call(
        functools.partial(_move_kernel, num_rows=len(rows) - 1),
        grid=(batch, heads, importance.shape[2] // _BLOCK),
        in_specs=[
            pl.BlockSpec((None, None, 1, _LANES), lambda b, j, _: (b, j, 0, 0)),
            *(of_head(x, (1, _BLOCK), by_row=True) for x in rows),
            *(of_head(x, (_BLOCK, x.shape[-1]), by_row=False) for x in entries),
        ],
        out_specs=[whole(width) for width, _ in sizes],
        out_shape=outputs_like(outputs, limits, rows, entries),
        scratch_shapes=[
            pltpu.SMEM((1,), jnp.int32),
            *(pltpu.VMEM((slots + _STORED, width), jnp.float32) for width, _ in sizes),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="eviction_move",
    )(limits, *rows, *entries)

    columns_kept, positions_kept = (side[..., i].astype(jnp.int32) - 1 for i in (0, 1))
    scales = iter((side[..., 2], side[..., 3]))
    moved = [
        QuantArray(values=new, scale=next(scales)) if isinstance(old, QuantArray) else new
        for new, old in ((new_k, k), (new_v, v))
    ]
    return Kept(moved[0], moved[1], positions_kept, columns_kept)


def thresholds(
    values: Float[Array, "R T"],
    counts: Int[Array, " R"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """Thresholds and cuts, as `search_thresholds` wants them; all values at least 0."""
    widths = ((0, 0), (0, -values.shape[1] % _LANES))
    rows = jnp.pad(values, widths, constant_values=-jnp.inf)[:, None]
    limits = _limits(rows, counts, interpret)[:, 0, 0]
    return limits[:, 0], limits[:, 1]


def _limits(
    importance: Float[Array, "B J T"],
    budget: Int[Array, " B"],
    interpret: bool | pltpu.InterpretParams,
) -> Int[Array, "B J 1 L"]:
    """What `_threshold_kernel` writes for each row; T is a multiple of L."""
    batch, heads, _ = importance.shape
    square = importance.reshape(batch, heads, -1, _LANES)
    limits = jax.ShapeDtypeStruct((batch, heads, 1, _LANES), jnp.int32)
    return pl.pallas_call(
        _threshold_kernel,
        grid=(batch, heads),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, None, *square.shape[2:]), lambda b, j: (b, j, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, 1, _LANES), lambda b, j: (b, j, 0, 0)),
        out_shape=outputs_like(limits, budget, square),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="eviction_threshold",
    )(budget, square)


def _threshold_kernel(budget: Ref, importance: Ref, limits: Ref) -> None:
    """Writes the bits of the smallest score that stays, and before which column its equals do."""
    bits = _ordered_bits(importance[...])
    lowest, highest = (_ordered_bits(jnp.full((1, 1), x, jnp.float32)) for x in (-jnp.inf, jnp.inf))
    index = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 0) * _LANES
    index += jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)

    def count(marked: Bool[Array, "R L"]) -> Int[Array, "1 1"]:
        return _number(marked, keepdims=True)

    wanted = jnp.minimum(budget[pl.program_id(0)], count(bits > lowest))

    def search(low: Array, high: Array, steps: int, enough: Any) -> Array:
        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
            holds = enough(middle)
            return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

        return jax.lax.fori_loop(0, steps, halve, (low, high))[0]

    threshold = search(lowest, highest + 1, 32, lambda x: count(bits >= x) >= wanted)
    ties = bits == threshold
    room = wanted - count(bits > threshold)
    zero = jnp.zeros_like(room)
    steps = (bits.size + 1).bit_length()
    cut = search(zero, zero + bits.size + 1, steps, lambda x: count(ties & (index < x)) <= room)
    lanes = jax.lax.broadcasted_iota(jnp.int32, limits.shape, 1)
    limits[...] = jnp.where(lanes == 0, threshold, cut)


def _move_kernel(limits: Ref, importance: Ref, *refs: Ref, num_rows: int) -> None:
    """Moves what stays of one block; the slots that stay empty hold zeros."""
    rows, refs = refs[:num_rows], refs[num_rows:]
    k, v, new_k, new_v, side, filled, held_k, held_v, held_side = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        filled[0] = 0
        for held in (held_k, held_v, held_side):
            held[...] = jnp.zeros(held.shape, jnp.float32)

    bits = _ordered_bits(importance[...])  # [1, C]
    columns = step * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    threshold, cut = limits[:, 0:1], limits[:, 1:2]
    stays = (bits > threshold) | ((bits == threshold) & (columns < cut))
    number = _number(stays)

    @pl.when(number > 0)
    def _move() -> None:
        marks = stays.astype(jnp.float32)
        down = jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), 0)
        across = jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), 1)
        before = (down < across).astype(jnp.bfloat16)
        every = jnp.broadcast_to(marks, (_SIDE, _BLOCK)).astype(jnp.bfloat16)
        rank = _dot(every, before, ((1,), (0,)))[0:1].astype(jnp.int32)
        first = filled[0] // _ROWS * _ROWS
        at = pl.ds(pl.multiple_of(first, _ROWS), _STORED)
        slot = first + jax.lax.broadcasted_iota(jnp.int32, (_STORED, _BLOCK), 0)
        chosen = ((slot == filled[0] + rank) & stays).astype(jnp.float32)  # [slot, column]
        numbers = [columns.astype(jnp.float32) + 1.0, *(row[...] for row in rows)]
        line = jax.lax.broadcasted_iota(jnp.int32, (_SIDE, _BLOCK), 0)
        lines = jnp.zeros((_SIDE, _BLOCK), jnp.float32)
        for i, row in enumerate(numbers):
            # What does not stay may be NaN, which no factor of 0 removes.
            lines = jnp.where(line == i, jnp.where(stays, row, 0.0), lines)
        # Slots that are not filled hold zeros, and so does the product where slots are.
        held_side[at, :] += _dot(chosen, lines, ((1,), (1,)))
        valid = jnp.broadcast_to(marks, (_LANES, _BLOCK)).T[:, :1] > 0.0  # [C, 1]
        for held, x in ((held_k, k), (held_v, v)):
            entries = jnp.where(valid, x[...].astype(jnp.float32), 0.0)
            if x.dtype == jnp.float32:
                held[at, :] += _dot(chosen, entries, ((1,), (0,)))
            else:  # bfloat16 holds these exactly
                one_pass = chosen.astype(jnp.bfloat16), entries.astype(jnp.bfloat16)
                held[at, :] += _dot(*one_pass, ((1,), (0,)))
        filled[0] += number

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        for new, held in ((new_k, held_k), (new_v, held_v), (side, held_side)):
            new[...] = held[: new.shape[0], :].astype(new.dtype)


def _number(marked: Bool[Array, "R L"], *, keepdims: bool = False) -> Int[Array, "*1"]:
    """How many are True. Float32 counts them exactly, up to 2^24 columns.

    A sum of int32 to one number is traced once more when Mosaic lowers it, and under
    `jax_enable_x64` becomes one of int64, which Mosaic has not.
    """
    return jnp.sum(marked.astype(jnp.float32), keepdims=keepdims).astype(jnp.int32)


def _ordered_bits(x: Float[Array, "X C"]) -> Int[Array, "X C"]:
    """Integers in the order of the floats, -0 and 0 the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _dot(x: Array, y: Array, contract: tuple[tuple[int], tuple[int]]) -> Float[Array, "X Y"]:
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
