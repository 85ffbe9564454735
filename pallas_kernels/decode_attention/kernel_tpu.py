"""Attention of one new token over cache slots on TPU: one pass over keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.bodies_tpu import Form, attend_kernel
from pallas_kernels.decode_attention.reference import (
    Entries,
    NewEntry,
    layer_of,
    softmax,
    visible,
    write,
)
from pallas_kernels.decode_attention.tiling import Tiling, tpu_tiling
from pallas_kernels.quantized import QuantArray
from pallas_kernels.slot_write.kernel_tpu import entry_spec, tile_of, tile_spec, write_slots_tpu
from pallas_kernels.varying import outputs_like


def decode_attention_tpu(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    positions: Int[Array, "B J T"],
    query: Int[Array, " B"],
    owners: Int[Array, "B J T"] | None = None,
    new: NewEntry | None = None,
    start: int | Int[Array, ""] | None = None,
    *,
    slots: int | None,
    start_multiple: int = 1,
    tiling: Tiling | None = None,
    interpret: Any = False,
    **options: Any,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None, Entries | None]:
    """See `pallas_kernels.decode_attention.decode_attention`.

    Raises:
        ValueError: a tiling whose blocks do not begin where the layer does.
    """
    cache = Entries(k, v, positions)
    values = k.values if isinstance(k, QuantArray) else k
    total, tile = values.shape[2], 32 // values.dtype.itemsize
    if isinstance(start, int):
        start_multiple = start
    if start is None:
        start_multiple = 0
    if tiling is None:
        tiling = tpu_tiling(
            slots=slots or total,
            head_dim=q.shape[2],
            itemsize=values.dtype.itemsize,
            start_multiple=start_multiple,
        )
    written = None
    if new is not None and (tiling is None or total % tile or tiling.block % tile):
        # Only whole tiles of what was read are written back.
        cache = written = write(
            cache, query, new, functools.partial(write_slots_tpu, interpret=interpret)
        )
        new = None
    if tiling is None:
        cache, owners = layer_of((cache, owners), start, slots)
        out, shares, _ = decode_attention_tpu(
            q, *cache, query, owners, slots=None, interpret=interpret, **options
        )
        return out, shares, written
    if start_multiple % tiling.block:
        raise ValueError(
            f"tiling: blocks of {tiling.block} slots do not divide the layer's start, "
            f"a multiple of {start_multiple}"
        )
    out, shares, appended = _attend(
        q,
        cache,
        query,
        owners,
        new,
        jnp.asarray(0 if start is None else start, jnp.int32),
        **options,
        slots=slots or total,
        block=min(tiling.block, total),
        interpret=interpret,
    )
    return out, shares, appended or written


# Traced once for all layers of a model that are alike.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("scale", "softcap", "window", "sets", "slots", "weights", "block", "interpret"),
    ),
)
def _attend(
    q: Float[Array, "B N H"],
    cache: Entries,
    query: Int[Array, " B"],
    owners: Int[Array, "B J T"] | None,
    new: NewEntry | None,
    start: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sets: int,
    slots: int,
    weights: bool,
    block: int,
    interpret: Any,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None, Entries | None]:
    batch, heads, size = q.shape
    cache_heads, total = cache.positions.shape[1:]
    group, blocks = heads // cache_heads, -(-slots // block)

    def by_block(x: Array) -> Array:
        """[B, ?, S] as [B, J, blocks, rows, block]; what is added is 0, and so never seen."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - slots)))
        return jnp.swapaxes(x.reshape(batch, cache_heads, -1, blocks, block), 2, 3)

    places, sharers = layer_of((cache.positions, owners), start, slots)
    seen = visible(places, query[:, None], sharers, window=window, sets=sets, group=group)[:, :, 0]
    slot = jnp.full(batch, total) if new is None else new.slot
    # Where a new entry goes, nobody reads.
    seen &= jnp.arange(slots) != (slot - start)[:, None, None]
    k, v, *narrow = cache.arrays()
    scales = narrow[1:]
    marks = [by_block(x) for x in (seen.astype(jnp.int8), *layer_of(scales, start, slots))]
    outputs = [jax.ShapeDtypeStruct((batch, cache_heads, group, size), q.dtype)]
    if weights:
        shape = (batch, cache_heads, blocks, group, block)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    by_head = pl.BlockSpec((1, 1, group, size), lambda b, j, *_: (b, j, 0, 0))
    by_slot = pl.BlockSpec((1, 1, block, size), lambda b, j, s, at, *_: (b, j, at[0] + s, 0))
    inputs = [q.reshape(outputs[0].shape), k, v, *marks]
    in_specs = [by_head, by_slot, by_slot, *map(_mark_spec, marks)]
    out_specs = [by_head, *map(_mark_spec, outputs[1:])]
    scratch: list[Any] = [pltpu.VMEM((group, n), jnp.float32) for n in (size, 1, 1)]
    aliases = {}
    if new is not None:
        # Keys and values go back as tiles of the block that was read, the rest as by `write_slots`.
        key, value, *numbers = new.at(query).arrays()
        own = [x.reshape(batch, cache_heads, 1, -1) for x in (key, value, *numbers[1:])]
        inputs += [*own, *(x[..., None] for x in numbers), *narrow]
        in_specs += [pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, j, *_: (b, j, 0, 0)) for x in own]
        in_specs += [*map(entry_spec, narrow), *map(tile_spec, narrow)]
        written_to = [1, 2, *range(len(inputs) - len(narrow), len(inputs))]
        aliases = {3 + i: len(outputs) + n for n, i in enumerate(written_to)}
        outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v, *narrow)]
        out_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2
        out_specs += map(tile_spec, narrow)
        scratch += [pltpu.VMEM((1, tile_of(x), size), x.dtype) for x in (k, v)]
        scratch.append(pltpu.SemaphoreType.DMA((2,)))
    form = Form(
        scale=scale,
        softcap=softcap,
        quantized=bool(scales),
        weights=weights,
        appended=new is not None,
        total=total,
        tile=tile_of(k),
        marks=tile_of(cache.positions),
    )
    out, *others = pl.pallas_call(
        functools.partial(attend_kernel, form=form),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, cache_heads, blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs_like(outputs, start, query, slot, inputs),
        input_output_aliases=aliases,
        # Tiles of positions are of all heads.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if aliases else "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="decode_attention",
    )((start // block)[None], query, slot, *inputs)
    out = out.reshape(q.shape)
    logits, arrays = others[:weights], others[weights:]
    written = None if new is None else Entries.of(arrays)
    if not weights:
        return out, None, written
    numerators, sums = softmax(jnp.swapaxes(logits[0], 2, 3).reshape(batch, heads, -1)[..., :slots])
    return out, numerators / sums, written


def _mark_spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, j, s, *_: (b, j, s, 0, 0))
