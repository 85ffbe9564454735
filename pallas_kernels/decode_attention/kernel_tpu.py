"""Attention of one new token over cache slots on TPU: one pass over keys and values."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.reference import layer_of, softmax
from pallas_kernels.decode_attention.tiling import Tiling, tpu_tiling
from pallas_kernels.quantized import QuantArray


def decode_attention_tpu(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    start: int | Int[Array, ""] | None = None,
    *,
    scale: float,
    softcap: float | None,
    weights: bool,
    start_multiple: int = 1,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None]:
    """See `pallas_kernels.decode_attention.decode_attention`.

    Raises:
        ValueError: a tiling whose blocks do not begin where the layer does.
    """
    slots = visible.shape[2]
    if isinstance(start, int):
        start_multiple = start
    if start is None:
        start_multiple = 0
    values = k.values if isinstance(k, QuantArray) else k
    if tiling is None:
        tiling = tpu_tiling(
            slots=slots,
            head_dim=q.shape[2],
            itemsize=values.dtype.itemsize,
            start_multiple=start_multiple,
        )
        if tiling is None:
            k, v = layer_of((k, v), start, slots)
            return decode_attention_tpu(
                q, k, v, visible, scale=scale, softcap=softcap, weights=weights, interpret=interpret
            )
    if start_multiple % tiling.block:
        raise ValueError(
            f"tiling: blocks of {tiling.block} slots do not divide the layer's start, "
            f"a multiple of {start_multiple}"
        )
    return _attend(
        q,
        k,
        v,
        visible,
        jnp.asarray(0 if start is None else start, jnp.int32),
        scale=scale,
        softcap=softcap,
        weights=weights,
        block=min(tiling.block, values.shape[2]),
        interpret=interpret,
    )


# Traced once for all layers of a model that are alike.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "weights", "block", "interpret"))
def _attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    start: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    weights: bool,
    block: int,
    interpret: Any,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None]:
    quantized = isinstance(k, QuantArray)
    k_values, v_values = (x.values if isinstance(x, QuantArray) else x for x in (k, v))
    batch, heads, size = q.shape
    cache_heads, slots = k_values.shape[1], visible.shape[2]
    group, blocks = heads // cache_heads, -(-slots // block)

    def by_block(x: Array) -> Array:
        """[B, ?, S] as [B, J, blocks, rows, block]; what is added is 0, and so never seen."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - slots)))
        return jnp.swapaxes(x.reshape(batch, cache_heads, -1, blocks, block), 2, 3)

    seen = by_block(visible.astype(jnp.int8))
    marks = [seen]
    if isinstance(k, QuantArray) and isinstance(v, QuantArray):
        marks += [by_block(x) for x in layer_of((k.scale, v.scale), start, slots)]

    def mark_spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, j, s, _: (b, j, s, 0, 0))

    head_spec = pl.BlockSpec((1, 1, group, size), lambda b, j, *_: (b, j, 0, 0))
    slot_spec = pl.BlockSpec((1, 1, block, size), lambda b, j, s, at: (b, j, at[0] + s, 0))
    outputs = [jax.ShapeDtypeStruct((batch, cache_heads, group, size), q.dtype)]
    output_specs = [head_spec]
    if weights:
        shape = (batch, cache_heads, blocks, group, block)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        output_specs.append(mark_spec(outputs[1]))
    out, *logits = pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, softcap=softcap, quantized=quantized, weights=weights
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, cache_heads, blocks),
            in_specs=[head_spec, slot_spec, slot_spec, *map(mark_spec, marks)],
            out_specs=output_specs,
            scratch_shapes=[
                pltpu.VMEM((group, size), jnp.float32),
                pltpu.VMEM((group, 1), jnp.float32),
                pltpu.VMEM((group, 1), jnp.float32),
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        (start // block)[None],
        q.reshape(batch, cache_heads, group, size),
        k_values,
        v_values,
        *marks,
    )
    out = out.reshape(q.shape)
    if not weights:
        return out, None
    by_slot = jnp.swapaxes(logits[0], 2, 3).reshape(batch, heads, -1)[..., :slots]
    numerators, total = softmax(by_slot)
    return out, numerators / total


def _kernel(
    # Prefetched.
    start_ref: Any,  # [1] the layer's first block, read by the index maps
    # Inputs.
    q_ref: Any,  # [1, 1, G, H]
    k_ref: Any,  # [1, 1, block, H]
    v_ref: Any,  # [1, 1, block, H]
    seen_ref: Any,  # [1, 1, 1, 1 or G, block] int8
    *refs: Any,  # of int8: k_scale_ref and v_scale_ref [1, 1, 1, 1, block]
    # Outputs: out_ref [1, 1, G, H]; with weights, logits_ref [1, 1, 1, G, block].
    # Scratch: sum_ref [G, H], peak_ref [G, 1], total_ref [G, 1].
    # Static.
    scale: float,
    softcap: float | None,
    quantized: bool,
    weights: bool,
) -> None:
    del start_ref
    scales, refs = refs[: 2 * quantized], refs[2 * quantized :]
    out_ref, *logits_ref, sum_ref, peak_ref, total_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def init() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        peak_ref[...] = jnp.full_like(peak_ref, -math.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    q = q_ref[0, 0]
    # float32 in full: the products cost less than the memory that they wait for.
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(
        jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32
    )
    seen = seen_ref[0, 0, 0].astype(jnp.float32)
    logits = scale * dot(q, k_ref[0, 0].astype(q.dtype), (((1,), (1,)), ((), ())))
    if quantized:
        logits *= scales[0][0, 0, 0]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen > 0.0, logits, -math.inf)
    if weights:
        logits_ref[0][0, 0, 0] = logits
    old = peak_ref[...]
    peak = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    finite = jnp.where(peak == -math.inf, 0.0, peak)
    fade = jnp.exp(old - finite)
    numerators = jnp.exp(logits - finite)
    peak_ref[...] = peak
    total_ref[...] = fade * total_ref[...] + jnp.sum(numerators, axis=1, keepdims=True)
    if quantized:
        numerators *= jnp.where(seen > 0.0, scales[1][0, 0, 0], 0.0)
    # Slots that no query head sees may hold NaN, which a weight of 0 does not take away.
    used = jnp.max(seen, axis=0, keepdims=True)
    used = jnp.broadcast_to(used, (8, used.shape[1])).T[:, :1]
    v = jnp.where(used > 0.0, v_ref[0, 0].astype(jnp.float32), 0.0).astype(q.dtype)
    sum_ref[...] = fade * sum_ref[...] + dot(
        numerators.astype(q.dtype), v, (((1,), (0,)), ((), ()))
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def finish() -> None:
        total = total_ref[...]
        out = sum_ref[...] / jnp.where(total == 0.0, 1.0, total)
        out_ref[0, 0] = out.astype(out_ref.dtype)
