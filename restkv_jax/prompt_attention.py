"""Attention of many queries: splash attention on TPU, cuDNN's on GPU, else an online softmax.

Either needs O(T x block) memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from restkv_jax import cudnn_attention, splash_attention
from restkv_jax.online_softmax import KeyBlocks, Seen, online_softmax
from restkv_jax.protocols import LayerSpec

# Queries x keys of one block: large enough for matrix units and the last-level cache alike.
BLOCK = 256
# Keys of one block where the queries are few.
_WIDE_BLOCK = 4096


@functools.partial(jax.jit, static_argnames=("spec", "rows", "implementation"), inline=True)
def causal_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
    rows: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N R"]]:
    """softmax(q kᵀ) v of a prompt over itself.

    Rows are aligned to the right: the first T - lengths columns are padding, which nobody sees
    and whose outputs are 0. Blocks that the mask empties for all rows are not computed. Logits,
    softmax and sums are float32.

    The outputs of 16-bit arrays are computed by splash attention on TPU and, without a soft cap, by
    cuDNN on GPU, unless the sums of all queries are asked for: cuDNN rounds them to the type of `q`
    and splash attention writes each of them 128 times, so those of the last queries are computed
    apart from them, in float32.

    Args:
        q: queries after rotary embedding.
        k: keys after rotary embedding.
        v: values.
        lengths: tokens in each row.
        spec: heads, scale, soft cap and sliding window of the layer.
        rows: static, R: of how many of the last queries the sums are asked for; all T if None.
        implementation: static; "xla", "splash", "cudnn", or None for the platform's best, see
            `dispatch`.

    Returns:
        The outputs, and the log of the sum of exp(logits) of the last R queries, +inf for padding.

    Raises:
        ValueError: `rows` is no number from 0 to T.
        NotImplementedError: the implementation that was named cannot run this, and why.
    """
    columns = q.shape[2]
    rows = columns if rows is None else rows
    if not 0 <= rows <= columns:
        raise ValueError(f"rows: expected 0 to T = {columns}, got {rows}")
    too_many = "the sums of all queries are asked for" if rows == columns else None

    def outputs_by(attend: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
        return functools.partial(_with_last_sums, attend=attend, spec=spec, rows=rows)

    return dispatch(
        "causal_attention",
        implementation,
        q,
        k,
        v,
        lengths,
        reference=functools.partial(_by_blocks, spec=spec, rows=rows),
        kernels=(
            Kernel(
                "splash",
                outputs_by(splash_attention.causal_attention),
                splash_attention.refusal(q) or too_many,
            ),
            Kernel(
                "cudnn",
                outputs_by(cudnn_attention.causal_attention),
                cudnn_attention.refusal(q, k, spec) or too_many,
            ),
        ),
    )


def _by_blocks(
    q: Array, k: Array, v: Array, lengths: Array, *, spec: LayerSpec, rows: int
) -> tuple[Array, Array]:
    columns = q.shape[2]
    block = min(BLOCK, columns)
    seen, blocks = prompt_mask(columns, lengths, spec, block)
    out, log_sums, _ = online_softmax(
        q, k, v, seen, blocks, spec=spec, block=block, key_block=block
    )
    return out, log_sums[:, :, columns - rows :]


def _with_last_sums(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    attend: Callable[..., Array],
    spec: LayerSpec,
    rows: int,
) -> tuple[Array, Array]:
    out = attend(q, k, v, lengths, spec=spec)
    return out, _last_log_sums(q, k, lengths, spec=spec, rows=rows)


def _last_log_sums(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
    rows: int,
) -> Float[Array, "B N R"]:
    columns = q.shape[2]
    if rows == 0:
        return jnp.zeros((*q.shape[:2], 0), jnp.float32)
    block, key_block = min(BLOCK, rows), min(_WIDE_BLOCK, columns)

    def seen(i: Array, j: Array) -> Bool[Array, "B 1 Q C"]:
        query_columns = columns - rows + i * block + jnp.arange(block, dtype=jnp.int32)
        key_columns = j * key_block + jnp.arange(key_block, dtype=jnp.int32)
        return _causal(query_columns, key_columns, columns - lengths, spec)[:, None]

    def blocks(i: Array) -> tuple[int, int]:
        del i
        return 0, -(-columns // key_block)

    last = q[:, :, columns - rows :]
    return online_softmax(last, k, k, seen, blocks, spec=spec, block=block, key_block=key_block)[1]


def prompt_mask(
    columns: int, lengths: Int[Array, " B"], spec: LayerSpec, block: int, causal_from: int = 0
) -> tuple[Seen, KeyBlocks]:
    """The mask of a prompt over itself, and the blocks of keys that it leaves something of.

    Args:
        columns: T.
        lengths: tokens in each row, aligned to the right.
        spec: of the layer.
        block: queries and keys of a block.
        causal_from: first column whose query does not see the future.
    """
    first = columns - lengths  # the first column of each row that holds a token
    earliest = jnp.min(first) // block

    def seen(i: Array, j: Array) -> Bool[Array, "B 1 Q C"]:
        query_columns = i * block + jnp.arange(block, dtype=jnp.int32)
        key_columns = j * block + jnp.arange(block, dtype=jnp.int32)
        inside = _causal(query_columns, key_columns, first, spec)
        if causal_from:
            query_columns, distance = query_columns[:, None], query_columns[:, None] - key_columns
            asked = (query_columns >= first[:, None, None]) & (query_columns < causal_from)
            asked &= (key_columns >= first[:, None, None]) & (key_columns < columns)
            inside |= asked if spec.window is None else asked & (distance < spec.window)
        return inside[:, None]

    def blocks(i: Array) -> tuple[Array, Array]:
        lowest = earliest
        if spec.window is not None:
            lowest = jnp.maximum(lowest, (i * block - spec.window + 1) // block)
        return lowest, jnp.where(i * block < causal_from, -(-columns // block), i + 1)

    return seen, blocks


def _causal(
    query_columns: Int[Array, " Q"],
    key_columns: Int[Array, " C"],
    first: Int[Array, " B"],
    spec: LayerSpec,
) -> Bool[Array, "B Q C"]:
    """True where a query may look: from each row's first column to its own.

    Columns that the last block is short of come after every real query.
    """
    distance = query_columns[:, None] - key_columns
    inside = (distance >= 0) & (key_columns >= first[:, None, None])
    return inside if spec.window is None else inside & (distance < spec.window)
