"""Causal attention of a prompt over itself, in blocks: O(T x block) memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.protocols import LayerSpec

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
    """softmax(q kᵀ) v over what comes before, with an online softmax over blocks of keys.

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
    batch, heads, columns, size = q.shape
    block = min(BLOCK, columns)
    blocks = -(-columns // block)
    # Whole blocks only: the columns added at the end come after every real query.
    padding = ((0, 0), (0, 0), (0, blocks * block - columns), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    kv_heads, group = spec.num_kv_heads, spec.group_size
    q = (q * spec.scale).reshape(batch, kv_heads, group, blocks, block, size)
    k = k.reshape(batch, kv_heads, blocks, block, size)
    v = v.reshape(batch, kv_heads, blocks, block, size)
    first = columns - lengths  # the first column of each row that holds a token
    earliest = jnp.min(first) // block

    def attend(i: Array) -> Array:
        queries = jax.lax.dynamic_index_in_dim(q, i, axis=3, keepdims=False)
        query_columns = i * block + jnp.arange(block)

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, peak, total = carry
            keys = jax.lax.dynamic_index_in_dim(k, j, axis=2, keepdims=False)
            values = jax.lax.dynamic_index_in_dim(v, j, axis=2, keepdims=False)
            logits = jnp.einsum(
                "bkgqh,bkch->bkgqc", queries, keys, preferred_element_type=jnp.float32
            )
            if spec.softcap is not None:
                logits = spec.softcap * jnp.tanh(logits / spec.softcap)
            key_columns = j * block + jnp.arange(block)
            distance = query_columns[:, None] - key_columns
            seen = (distance >= 0) & (key_columns >= first[:, None, None])
            if spec.window is not None:
                seen &= distance < spec.window
            logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
            base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights = jnp.exp(logits - base)
            keep = jnp.exp(peak - base)
            update = jnp.einsum(
                "bkgqc,bkch->bkgqh",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
            return out * keep + update, new_peak, total

        shape = (batch, kv_heads, group, block)
        start = (
            jnp.zeros((*shape, size), jnp.float32),
            jnp.full((*shape, 1), -jnp.inf, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
        )
        lowest = earliest
        if spec.window is not None:
            lowest = jnp.maximum(lowest, (i * block - spec.window + 1) // block)
        out, _, total = jax.lax.fori_loop(lowest, i + 1, step, start)
        return (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)

    out = jnp.moveaxis(jax.lax.map(attend, jnp.arange(blocks)), 0, 3)
    return out.reshape(batch, heads, blocks * block, size)[:, :, :columns]
