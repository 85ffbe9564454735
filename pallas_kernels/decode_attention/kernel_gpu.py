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
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.bodies_gpu import combine_kernel, part_kernel
from pallas_kernels.decode_attention.reference import Entries, NewEntry, softmax
from pallas_kernels.decode_attention.tiling import Tiling, gpu_tiling, power_of_two
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import triton_call

# The fewest rows of a matrix product.
_ROWS = 16
# Numbers of the parts that a program loads at once.
_COMBINED = 4096
# The cache's arrays among the kernel's inputs, and what they are among its outputs.
_CACHE = ("k", "v", "positions", "k_scale", "v_scale")
_WRITTEN = tuple(f"_{name}_ptr" for name in _CACHE)


def decode_attention_triton(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    positions: Int[Array, "B J T"],
    query: Int[Array, " B"],
    owners: Int[Array, "B J T"] | None = None,
    new: NewEntry | None = None,
    start: int | Int[Array, ""] | None = None,
    *,
    weights: bool,
    tiling: Tiling | None = None,
    call: Callable[..., tuple[Array, ...]] = triton_call,
    **options: Any,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None, Entries | None]:
    """See `pallas_kernels.decode_attention.decode_attention`.

    `call` launches a kernel as `triton_call` does.
    """
    cache = Entries(k, v, positions)
    begin = jnp.asarray(0 if start is None else start, jnp.int32)[None]
    inputs, shapes, static = launch(
        q, cache, query, owners, new, begin, weights=weights, tiling=tiling, **options
    )
    sums, peaks, totals, logits, *arrays = call(
        part_kernel, inputs, shapes, name="decode_attention", **static
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
        STEP=min(power_of_two(parts), max(1, _COMBINED // static["SIZE"])),
        SIZE=static["SIZE"],
    )
    written = None if new is None else Entries.of(arrays)
    if not weights:
        return out, None, written
    numerators, total = softmax(logits)
    return out, numerators / total, written


def launch(
    q: Array,
    cache: Entries,
    query: Array,
    owners: Array | None,
    new: NewEntry | None,
    begin: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sets: int,
    slots: int | None,
    weights: bool,
    tiling: Tiling | None,
) -> tuple[tuple[Array, ...], tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]:
    """The kernel's input arrays, its outputs' shapes, and its grid with the static arguments."""
    batch, heads, size = q.shape
    arrays = cache.arrays()
    cache_heads, total_slots = cache.positions.shape[1:]
    slots, group = slots or total_slots, heads // cache_heads
    if tiling is None:
        tiling = gpu_tiling(
            lists=batch * cache_heads,
            slots=slots,
            head_dim=size,
            itemsize=arrays[0].dtype.itemsize,
        )
    # Whole blocks in each part.
    part = -(-slots // (tiling.splits * tiling.block)) * tiling.block
    parts = -(-slots // part)
    slot, entry = begin, tuple[Array, ...](())
    if new is not None:
        slot, (key, value, _, *scales) = new.slot, new.at(query).arrays()
        entry = (key, value, *scales)

    def padded(some: tuple[Array, ...], count: int) -> tuple[Array, ...]:
        return *some, *(begin,) * (count - len(some))  # those are not read

    inputs = (
        *(q, query, begin, begin if owners is None else owners, slot),
        *padded(entry, len(_CACHE) - 1),
        *padded(arrays, len(_CACHE)),
    )
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = [
        number((parts, batch, heads, size)),
        number((parts, batch, heads)),
        number((parts, batch, heads)),
        number((batch, heads, slots) if weights else (1,)),
    ]
    aliases = {}
    if new is not None:
        first = len(inputs) - len(_CACHE)
        aliases = {first + i: len(shapes) + i for i in range(len(arrays))}
        shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    options = {
        "grid": (batch * cache_heads, parts),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "aliases": aliases,
        **dict.fromkeys(_WRITTEN[len(aliases) :]),
        "scale": float(scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "window": 0 if window is None else window,
        "lists": batch * cache_heads,
        "heads": cache_heads,
        "slots": slots,
        "total_slots": total_slots,
        "group": group,
        "size": size,
        "per_set": group // sets,
        "part": part,
        "BLOCK": tiling.block,
        "GROUP": max(_ROWS, power_of_two(group)),
        "SIZE": max(_ROWS, power_of_two(size)),
        "QUANTIZED": isinstance(cache.k, QuantArray),
        "OWNED": owners is not None,
        "APPENDED": new is not None,
        "WEIGHTS": weights,
    }
    return inputs, tuple(shapes), options
