"""Eviction on a GPU: Triton kernels for a threshold search and for moving what stays.

Importing this file needs Triton. XLA's `top_k` sorts all columns with their indices. A radix sort
of 8 bits a pass reads and writes 8 bytes a column four times and counts digits before each pass,
80 bytes a column, then C indices are sorted again and gathered by. Here the bits of the threshold
are found three at a time: 4 bytes a column for each of at most 11 steps, ended by the first that
meets the budget, about 7 for 131,072 distinct scores and a budget of 1,024. They are only read, by
one launch for all rows, from the L2 cache, where the scores of a layer fit (4 MiB for 8 heads of
128k), or the L1 cache where a row is as short as in decoding. One more reading finds where each
block's entries go, so that a second launch moves all blocks side by side; of keys and values it
reads only what stays. Predicted, not measured: 0.04 ms for 8 heads of 128k, in which 8
multiprocessors read 0.5 MiB each 8 times at 0.1 TB/s.

Triton through jax-triton and not Pallas: Pallas's Triton backend is deprecated since jax 0.11.2,
and Mosaic GPU has neither scans nor stores to computed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import triton
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction.bodies_gpu import cut_kernel, move_kernel, threshold_kernel
from pallas_kernels.masked_eviction.reference import Kept
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import triton_call

_BLOCK = 64  # columns that are moved at a time
_SEARCHED = 8192  # columns in a step of the search


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
