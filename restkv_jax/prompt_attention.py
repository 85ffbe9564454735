"""Attention of many queries: cuDNN's on GPU, else blocks with an online softmax.

Either needs O(T x block) memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.quantized import QuantArray, dequantize
from restkv_jax import cudnn_attention
from restkv_jax.protocols import LayerSpec

# Queries x keys of one block: large enough for matrix units and the last-level cache alike.
BLOCK = 256
# Keys of one block where the queries are few.
_WIDE_BLOCK = 4096

# The mask between block i of queries and block j of keys, by cache head or by query head; False
# for what lies beyond the end.
Seen = Callable[[Array, Array], Bool[Array, "B M Q C"]]
# From which block of keys to which (that one left out) block i of queries looks.
KeyBlocks = Callable[[Array], tuple[int | Array, int | Array]]


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

    On GPU cuDNN computes the outputs, of 16-bit arrays without a soft cap, unless the sums of all
    queries are asked for: it rounds them to the type of `q`, so those of the last queries are
    computed apart from it, in float32.

    Args:
        q: queries after rotary embedding.
        k: keys after rotary embedding.
        v: values.
        lengths: tokens in each row.
        spec: heads, scale, soft cap and sliding window of the layer.
        rows: static, R: of how many of the last queries the sums are asked for; all T if None.
        implementation: static; "xla", "cudnn", or None for the platform's best, see `dispatch`.

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
    refusal = cudnn_attention.refusal(q, k, spec)
    if rows == columns:
        refusal = refusal or "the sums of all queries are asked for, and cuDNN rounds them"
    return dispatch(
        "causal_attention",
        implementation,
        q,
        k,
        v,
        lengths,
        reference=functools.partial(_by_blocks, spec=spec, rows=rows),
        kernels=(Kernel("cudnn", functools.partial(_by_cudnn, spec=spec, rows=rows), refusal),),
    )


def _by_blocks(
    q: Array, k: Array, v: Array, lengths: Array, *, spec: LayerSpec, rows: int
) -> tuple[Array, Array]:
    columns = q.shape[2]
    block = min(BLOCK, columns)
    seen, blocks = _prompt_mask(columns, lengths, spec, block)
    out, log_sums = online_softmax(q, k, v, seen, blocks, spec=spec, block=block, key_block=block)
    return out, log_sums[:, :, columns - rows :]


def _by_cudnn(
    q: Array, k: Array, v: Array, lengths: Array, *, spec: LayerSpec, rows: int
) -> tuple[Array, Array]:
    out = cudnn_attention.causal_attention(q, k, v, lengths, spec=spec)
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
        query_columns = columns - rows + i * block + jnp.arange(block)
        key_columns = j * key_block + jnp.arange(key_block)
        return _causal(query_columns, key_columns, columns - lengths, spec)[:, None]

    def blocks(i: Array) -> tuple[int, int]:
        del i
        return 0, -(-columns // key_block)

    last = q[:, :, columns - rows :]
    return online_softmax(last, k, k, seen, blocks, spec=spec, block=block, key_block=key_block)[1]


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
    seen, blocks = _prompt_mask(columns, lengths, spec, block, causal_from)
    if log_sums is None:
        log_sums = online_softmax(q, k, k, seen, blocks, spec=spec, block=block, key_block=block)[1]
    queries, keys = _in_blocks(q, k.shape[1], block), whole_blocks(k, block)
    log_sums = whole_blocks(log_sums, block, fill=jnp.inf).reshape(queries.shape[:-1])

    def add_rows(i: Array, sums: Array) -> Array:
        rows = jax.lax.dynamic_index_in_dim(queries, i, axis=3, keepdims=False)
        total = jax.lax.dynamic_index_in_dim(log_sums, i, axis=3, keepdims=False)[..., None]

        def add(j: Array, sums: Array) -> Array:
            logits = _logits(rows, block_at(keys, j, block, axis=2), seen(i, j), spec)
            weights = jnp.sum(jnp.exp(logits - total), axis=-2)
            weights += block_at(sums, j, block, axis=3)
            return jax.lax.dynamic_update_slice_in_dim(sums, weights, j * block, axis=3)

        return jax.lax.fori_loop(*blocks(i), add, sums)

    start = jnp.zeros((*queries.shape[:3], keys.shape[2]), jnp.float32)
    sums = jax.lax.fori_loop(0, queries.shape[3], add_rows, start)
    return sums.reshape(*q.shape[:2], -1)[..., :columns]


def online_softmax(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B J S H"] | QuantArray,
    v: Float[Array, "B J S H"] | QuantArray,
    seen: Seen,
    key_blocks: KeyBlocks,
    *,
    spec: LayerSpec,
    block: int,
    key_block: int,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """One block of queries at a time over those blocks of keys that `key_blocks` names for it.

    Returns:
        softmax(q kᵀ) v, and the log of each query's sum of exp(logits), +inf where it sees nothing.
    """
    batch, heads, tokens, size = q.shape
    queries = _in_blocks(q, k.shape[1], block)
    k, v = jax.tree.map(lambda x: whole_blocks(x, key_block), (k, v))

    def part(x: Array | QuantArray, j: Array) -> Array:
        leaves = jax.tree.map(lambda leaf: block_at(leaf, j, key_block, axis=2), x)
        return dequantize(leaves, q.dtype)

    def attend(i: Array) -> tuple[Array, Array]:
        rows = jax.lax.dynamic_index_in_dim(queries, i, axis=3, keepdims=False)

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, peak, total = carry
            logits = _logits(rows, part(k, j), seen(i, j), spec)
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
        out, peak, total = jax.lax.fori_loop(*key_blocks(i), step, start)
        out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
        return out, jnp.where(total == 0.0, jnp.inf, peak + jnp.log(total))[..., 0]

    out, log_sums = jax.lax.map(attend, jnp.arange(queries.shape[3]))
    out = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, size)[:, :, :tokens]
    return out, jnp.moveaxis(log_sums, 0, 3).reshape(batch, heads, -1)[:, :, :tokens]


def whole_blocks(x: Array, block: int, fill: float = 0) -> Array:
    """Pads axis 2 to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, -x.shape[2] % block)
    return jnp.pad(x, widths, constant_values=fill)


def block_at(x: Array, index: Array, block: int, *, axis: int) -> Array:
    """One block of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=axis)


def _prompt_mask(
    columns: int, lengths: Int[Array, " B"], spec: LayerSpec, block: int, causal_from: int = 0
) -> tuple[Seen, KeyBlocks]:
    first = columns - lengths  # the first column of each row that holds a token
    earliest = jnp.min(first) // block

    def seen(i: Array, j: Array) -> Bool[Array, "B 1 Q C"]:
        query_columns = i * block + jnp.arange(block)
        key_columns = j * block + jnp.arange(block)
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


def _in_blocks(q: Float[Array, "B N T H"], sets: int, block: int) -> Float[Array, "B J G I Q H"]:
    batch, heads, _, size = q.shape
    return whole_blocks(q, block).reshape(batch, sets, heads // sets, -1, block, size)


def _logits(
    rows: Float[Array, "B J G Q H"],
    keys: Float[Array, "B J C H"],
    mask: Bool[Array, "B M Q C"],
    spec: LayerSpec,
) -> Float[Array, "B J G Q C"]:
    sets = keys.shape[1]
    logits = jnp.einsum("bjgqh,bjch->bjgqc", rows, keys, preferred_element_type=jnp.float32)
    logits *= spec.scale  # not of the queries: those may be bfloat16
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    by_set = sets if mask.shape[1] > 1 else 1
    mask = mask.reshape(mask.shape[0], by_set, -1, *mask.shape[2:])
    return jnp.where(mask, logits, -jnp.inf)
