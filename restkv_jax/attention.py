"""Attention of many queries in blocks, with an online softmax: O(T x block) memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.quantized import QuantArray, dequantize
from restkv_jax.protocols import LayerSpec
from restkv_jax.slots import LayerSlots, visible

# Queries x keys of one block: large enough for matrix units and the last-level cache alike.
BLOCK = 256


@functools.partial(jax.jit, static_argnames=("spec",), inline=True)
def causal_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
) -> Float[Array, "B N T H"]:
    """softmax(q kᵀ) v of a prompt over itself.

    Rows are aligned to the right: the first T - lengths columns are padding, which nobody sees
    and whose outputs are 0. Blocks that the mask empties for all rows are not computed. Logits,
    softmax and sums are float32.

    Args:
        q: queries after rotary embedding.
        k: keys after rotary embedding.
        v: values.
        lengths: tokens in each row.
        spec: heads, scale, soft cap and sliding window of the layer.
    """
    columns = q.shape[2]
    block = min(BLOCK, columns)
    first = columns - lengths  # the first column of each row that holds a token
    earliest = jnp.min(first) // block

    def seen(i: Array, j: Array) -> Bool[Array, "B 1 Q C"]:
        query_columns = i * block + jnp.arange(block)
        # Columns that the last block is short of come after every real query.
        key_columns = j * block + jnp.arange(block)
        distance = query_columns[:, None] - key_columns
        inside = (distance >= 0) & (key_columns >= first[:, None, None])
        if spec.window is not None:
            inside &= distance < spec.window
        return inside[:, None]

    def blocks(i: Array) -> tuple[Array, Array]:
        lowest = earliest
        if spec.window is not None:
            lowest = jnp.maximum(lowest, (i * block - spec.window + 1) // block)
        return lowest, i + 1

    return _online_softmax(q, k, v, seen, blocks, spec=spec, block=block, key_block=block)


def slot_attention(
    q: Float[Array, "B N T H"],
    layer: LayerSlots,
    positions: Int[Array, "B T"],
    *,
    spec: LayerSpec,
    heads: int,
) -> Float[Array, "B N T H"]:
    """softmax(q kᵀ) v of several new tokens over a cache's slots, their own among them.

    Args:
        q: queries after rotary embedding.
        layer: keys and values of S slots.
        positions: of the queries, negative for padding, whose outputs are 0.
        spec: heads, scale, soft cap and sliding window of the layer.
        heads: sets of entries, see `LayerStack.heads`.
    """
    block, key_block = min(BLOCK, q.shape[2]), min(BLOCK, layer.positions.shape[2])
    tokens = jnp.pad(positions, ((0, 0), (0, -q.shape[2] % block)), constant_values=-1)
    marks = layer.positions, layer.owners
    marks = jax.tree.map(lambda x: _whole_blocks(x, key_block, fill=-1), marks)

    def seen(i: Array, j: Array) -> Bool[Array, "B M Q C"]:
        places, owners = jax.tree.map(lambda x: _block(x, j, key_block, axis=2), marks)
        return visible(places, owners, _block(tokens, i, block, axis=1), spec, heads)

    filled = jnp.any(layer.positions >= 0, axis=(0, 1))
    last = jnp.max(jnp.where(filled, jnp.arange(filled.size) // key_block + 1, 0))

    def blocks(i: Array) -> tuple[int, Array]:
        del i
        return 0, last

    return _online_softmax(
        q, layer.k, layer.v, seen, blocks, spec=spec, block=block, key_block=key_block
    )


def slot_weights(
    q: Float[Array, "B N T H"],
    layer: LayerSlots,
    positions: Int[Array, "B T"],
    *,
    spec: LayerSpec,
    heads: int,
) -> Float[Array, "B N S"]:
    """What each slot receives of these queries' attention: the column sums, float32.

    Arguments as of `slot_attention`; the weights of one query at a time are alive.
    """

    def add(total: Array, args: tuple[Array, Array]) -> tuple[Array, None]:
        query, position = args  # [B, N, H], [B]
        seen = layer.visible(position[:, None], spec, heads)[:, :, 0]
        _, weights = decode_attention(
            query, layer.k, layer.v, seen, scale=spec.scale, softcap=spec.softcap
        )
        return total + weights, None

    start = jnp.zeros((*q.shape[:2], layer.positions.shape[2]), jnp.float32)
    return jax.lax.scan(add, start, (jnp.moveaxis(q, 2, 0), positions.T))[0]


def _online_softmax(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B J S H"] | QuantArray,
    v: Float[Array, "B J S H"] | QuantArray,
    seen: Callable[[Array, Array], Bool[Array, "B M Q C"]],
    key_blocks: Callable[[Array], tuple[int | Array, int | Array]],
    *,
    spec: LayerSpec,
    block: int,
    key_block: int,
) -> Float[Array, "B N T H"]:
    """One block of queries at a time over those blocks of keys that `key_blocks` names for it.

    `seen(i, j)` is the mask between block i of queries and block j of keys, by cache head or by
    query head; False for what lies beyond the end.
    """
    batch, heads, tokens, size = q.shape
    sets = k.shape[1]
    q = _whole_blocks(q, block)
    k, v = jax.tree.map(lambda x: _whole_blocks(x, key_block), (k, v))
    queries = (q * spec.scale).reshape(batch, sets, heads // sets, -1, block, size)

    def part(x: Array | QuantArray, j: Array) -> Array:
        leaves = jax.tree.map(lambda leaf: _block(leaf, j, key_block, axis=2), x)
        return dequantize(leaves, q.dtype)

    def attend(i: Array) -> Array:
        rows = jax.lax.dynamic_index_in_dim(queries, i, axis=3, keepdims=False)

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, peak, total = carry
            logits = jnp.einsum(
                "bjgqh,bjch->bjgqc", rows, part(k, j), preferred_element_type=jnp.float32
            )
            if spec.softcap is not None:
                logits = spec.softcap * jnp.tanh(logits / spec.softcap)
            mask = seen(i, j)
            if mask.shape[1] > 1:
                mask = mask.reshape(batch, sets, -1, *mask.shape[2:])
            else:
                mask = mask[:, None]
            logits = jnp.where(mask, logits, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
            base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights = jnp.exp(logits - base)
            keep = jnp.exp(peak - base)
            values = part(v, j)
            update = jnp.einsum(
                "bjgqc,bjch->bjgqh",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
            return out * keep + update, new_peak, total

        shape = rows.shape[:-1]
        start = (
            jnp.zeros((*shape, size), jnp.float32),
            jnp.full((*shape, 1), -jnp.inf, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
        )
        out, _, total = jax.lax.fori_loop(*key_blocks(i), step, start)
        return (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)

    out = jnp.moveaxis(jax.lax.map(attend, jnp.arange(queries.shape[3])), 0, 3)
    return out.reshape(batch, heads, -1, size)[:, :, :tokens]


def _whole_blocks(x: Array, block: int, fill: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, -x.shape[2] % block)
    return jnp.pad(x, widths, constant_values=fill)


def _block(x: Array, index: Array, block: int, *, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=axis)
