"""Attention of new tokens over a cache's slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention import decode_attention, visible
from pallas_kernels.varying import vary_like
from restkv_jax.online_softmax import block_at, online_softmax, whole_blocks
from restkv_jax.prompt_attention import BLOCK
from restkv_jax.protocols import LayerSpec
from restkv_jax.slots import LayerSlots


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
    marks, lists = (layer.positions, layer.owners), layer.positions.shape[1]
    sets, group = heads // lists, spec.num_heads // lists
    marks = jax.tree.map(lambda x: whole_blocks(x, key_block, fill=-1), marks)

    def seen(i: Array, j: Array) -> Bool[Array, "B M Q C"]:
        places, owners = jax.tree.map(lambda x: block_at(x, j, key_block, axis=2), marks)
        queries = block_at(tokens, i, block, axis=1)
        return visible(places, queries, owners, window=spec.window, sets=sets, group=group)

    filled = jnp.any(layer.positions >= 0, axis=(0, 1))
    last = jnp.max(jnp.where(filled, jnp.arange(filled.size) // key_block + 1, 0))

    def blocks(i: Array) -> tuple[int, Array]:
        del i
        return 0, last

    out, *_ = online_softmax(
        q, layer.k, layer.v, seen, blocks, spec=spec, block=block, key_block=key_block
    )
    return out


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
        _, weights, _ = decode_attention(
            query,
            layer.k,
            layer.v,
            layer.positions,
            position,
            layer.owners,
            scale=spec.scale,
            softcap=spec.softcap,
            window=spec.window,
            sets=heads // layer.positions.shape[1],
            weights=True,
        )
        assert weights is not None
        return total + weights, None

    start = jnp.zeros((*q.shape[:2], layer.positions.shape[2]), jnp.float32)
    start = vary_like(start, q, layer.positions)
    return jax.lax.scan(add, start, (jnp.moveaxis(q, 2, 0), positions.T))[0]
