"""One new entry of each row into the cache's slots on TPU, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.slot_write.reference import Arrays
from pallas_kernels.varying import outputs_like


# Traced once for all layers of a model that are alike.
@functools.partial(jax.jit, static_argnames="interpret")
def write_slots_tpu(
    stacks: Arrays,
    entries: Arrays,
    slots: Int[Array, "B 1"],
    *,
    interpret: Any = False,
) -> Arrays:
    """See `pallas_kernels.slot_write.write_slots`."""
    batch, _, total = stacks[0].shape[:3]
    tile_specs = list(map(tile_spec, stacks))
    count = len(stacks)
    written = pl.pallas_call(
        functools.partial(_kernel, tiles=tuple(map(tile_of, stacks)), total=total),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[*map(entry_spec, stacks), *tile_specs],
            out_specs=tile_specs,
        ),
        out_shape=outputs_like(list(stacks), entries, slots),
        # Of all inputs, the slots count too.
        input_output_aliases={1 + count + i: i for i in range(count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_slots",
    )(slots[:, 0], *(jnp.swapaxes(x, 1, 2) for x in entries), *stacks)
    return tuple(written)


def tile_of(stack: Array) -> int:
    """Slots of a tile: rows, 8 of float32, 16 of bfloat16 and 32 of int8; without H, columns."""
    return min(stack.shape[2], 32 // stack.dtype.itemsize if stack.ndim == 4 else 128)


def tile_spec(stack: Array) -> pl.BlockSpec:
    """The tile of a row's slot; rows are first in the grid, slots last of what is prefetched."""
    tile, last = tile_of(stack), stack.shape[2] - 1

    def index(b: Any, *rest: Any) -> tuple[Any, ...]:
        return b, 0, jnp.minimum(rest[-1][b], last) // tile, *(0,) * (stack.ndim - 3)

    return pl.BlockSpec((1, stack.shape[1], tile, *stack.shape[3:]), index)


def entry_spec(stack: Array) -> pl.BlockSpec:
    """A row's entry of all heads, of an array [B, J, 1, *H]."""
    shape = 1, stack.shape[1], 1, *stack.shape[3:]
    return pl.BlockSpec(shape, lambda b, *_: (b, *(0,) * (stack.ndim - 1)))


def with_entry(old: Array, entry: Array, at: Array) -> Array:
    """A tile [J, tile, *H] with an entry [J, 1, *H] at its place `at`, or as it is for -1."""
    # Masks are 32 bits wide, and float32 holds the numbers of all shorter types exactly.
    wide = old.dtype if old.dtype.itemsize == 4 else jnp.float32
    place = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    return jnp.where(place == at, entry.astype(wide), old.astype(wide)).astype(old.dtype)


def _kernel(
    # Prefetched.
    slots_ref: Any,  # [B] int32, T for entries to leave out
    # Inputs, one of each array: entries [1, J, 1, *H], then tiles [1, J, tile, *H].
    # Outputs, one of each array: tiles [1, J, tile, *H].
    *refs: Any,
    # Static.
    tiles: tuple[int, ...],
    total: int,
) -> None:
    count = len(tiles)
    slot = slots_ref[pl.program_id(0)]
    for entry_ref, old_ref, new_ref, tile in zip(
        refs[:count], refs[count : 2 * count], refs[2 * count :], tiles, strict=True
    ):
        # The tile of an entry to leave out is written back as it is.
        at = jnp.where(slot < total, slot % tile, -1)
        new_ref[0] = with_entry(old_ref[0], entry_ref[0], at)
