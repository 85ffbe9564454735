"""What each key of a prompt receives of all its queries' attention, as H2O sums it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.varying import vary_like
from restkv_jax.online_softmax import (
    block_at,
    block_logits,
    in_blocks,
    online_softmax,
    whole_blocks,
)
from restkv_jax.prompt_attention import BLOCK, causal_attention, prompt_mask
from restkv_jax.protocols import LayerSpec


def attention_and_received(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """`causal_attention`, the log of all queries' sums, and `received_attention`.

    On CPU the attention's own weights are added up, which spares a second product of queries and
    keys for the memory of one block of queries' weights, [B, N, BLOCK, T]. Where products are
    cheap and memory is dear they are made twice.

    Arguments as of `causal_attention`.
    """
    block = min(BLOCK, q.shape[2])

    def in_one_pass(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, ...]:
        seen, blocks = prompt_mask(q.shape[2], lengths, spec, block)
        out, log_sums, received = online_softmax(
            q, k, v, seen, blocks, spec=spec, block=block, key_block=block, received=True
        )
        assert received is not None
        return out, log_sums, received

    def in_two_passes(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, ...]:
        out, log_sums = causal_attention(q, k, v, lengths, spec=spec)
        return out, log_sums, received_attention(q, k, lengths, log_sums, spec=spec)

    return jax.lax.platform_dependent(q, k, v, lengths, cpu=in_one_pass, default=in_two_passes)


@functools.partial(jax.jit, static_argnames=("spec", "causal_from"), inline=True)
def received_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    log_sums: Float[Array, "B N T"] | None = None,
    *,
    spec: LayerSpec,
    causal_from: int = 0,
) -> Float[Array, "B N T"]:
    """What each key of a prompt receives of all queries' attention: the column sums, float32.

    Args:
        q: queries, rows aligned to the right as in `causal_attention`.
        k: keys.
        lengths: tokens in each row.
        log_sums: of the queries, as `causal_attention` returns them; computed if None.
        spec: of the layer.
        causal_from: first column whose query does not see the future; `log_sums` must be theirs.
    """
    columns = q.shape[2]
    block = min(BLOCK, columns)
    seen, blocks = prompt_mask(columns, lengths, spec, block, causal_from)
    if log_sums is None:
        log_sums = online_softmax(q, k, k, seen, blocks, spec=spec, block=block, key_block=block)[1]
    queries, keys = in_blocks(q, k.shape[1], block), whole_blocks(k, block)
    log_sums = whole_blocks(log_sums, block, fill=jnp.inf).reshape(queries.shape[:-1])

    def add_rows(i: Array, sums: Array) -> Array:
        rows = jax.lax.dynamic_index_in_dim(queries, i, axis=3, keepdims=False)
        total = jax.lax.dynamic_index_in_dim(log_sums, i, axis=3, keepdims=False)[..., None]

        def add(j: Array, sums: Array) -> Array:
            logits = block_logits(rows, block_at(keys, j, block, axis=2), seen(i, j), spec)
            weights = jnp.sum(jnp.exp(logits - total), axis=-2)
            weights += block_at(sums, j, block, axis=3)
            return jax.lax.dynamic_update_slice_in_dim(sums, weights, j * block, axis=3)

        return jax.lax.fori_loop(*blocks(i), add, sums)

    start = jnp.zeros((*queries.shape[:3], keys.shape[2]), jnp.float32)
    start = vary_like(start, queries, keys, log_sums, lengths)
    sums = jax.lax.fori_loop(0, queries.shape[3], add_rows, start)
    return sums.reshape(*q.shape[:2], -1)[..., :columns]
