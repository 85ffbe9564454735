"""Softmax attention by blocks of queries and keys, the largest logit and the sum on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.quantized import QuantArray, dequantize
from pallas_kernels.varying import vary_like
from restkv_jax.protocols import LayerSpec

# The mask between block i of queries and block j of keys, by cache head or by query head; False
# for what lies beyond the end.
Seen = Callable[[Array, Array], Bool[Array, "B M Q C"]]
# From which block of keys to which (that one left out) block i of queries looks.
KeyBlocks = Callable[[Array], tuple[int | Array, int | Array]]


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
    received: bool = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"], Float[Array, "B N S"] | None]:
    """One block of queries at a time over those blocks of keys that `key_blocks` names for it.

    Args:
        q: queries.
        k: keys.
        v: values.
        seen: the mask of two blocks.
        key_blocks: which blocks of keys a block of queries looks at.
        spec: of the layer.
        block: queries of a block.
        key_block: keys of a block.
        received: also add up what each key receives; the weights of one block of queries over
            all S keys are then alive.

    Returns:
        softmax(q kᵀ) v; the log of each query's sum of exp(logits), +inf where it sees nothing;
        and the column sums of the weights, or None.
    """
    batch, heads, tokens, size = q.shape
    key_tokens = k.shape[2]
    queries = in_blocks(q, k.shape[1], block)
    k, v = jax.tree.map(lambda x: whole_blocks(x, key_block), (k, v))

    def part(x: Array | QuantArray, j: Array) -> Array:
        leaves = jax.tree.map(lambda leaf: block_at(leaf, j, key_block, axis=2), x)
        return dequantize(leaves, q.dtype)

    def attend(columns: _Columns | None, i: Array) -> tuple[_Columns | None, tuple[Array, Array]]:
        rows = jax.lax.dynamic_index_in_dim(queries, i, axis=3, keepdims=False)

        def step(j: Array, carry: _Carry) -> _Carry:
            out, peak, total, columns = carry
            logits = block_logits(rows, part(k, j), seen(i, j), spec)
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
            if columns is not None:
                columns = columns.remember(j, weights, new_peak)
            return out * keep + update, new_peak, total, columns

        shape = rows.shape[:-1]
        start = (
            jnp.zeros((*shape, size), jnp.float32),
            jnp.full((*shape, 1), -jnp.inf, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
            columns,
        )
        start = vary_like(start, q, k, v)
        out, peak, total, columns = jax.lax.fori_loop(*key_blocks(i), step, start)
        out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
        log_sums = jnp.where(total == 0.0, jnp.inf, peak + jnp.log(total))
        if columns is not None:
            real = i * block + jnp.arange(block)[:, None] < tokens  # the last block is padded
            counted = jnp.where(real, log_sums, jnp.inf)
            columns = jax.lax.fori_loop(
                *key_blocks(i), lambda j, columns: columns.add(j, counted), columns
            )
        return columns, (out, log_sums[..., 0])

    columns = None
    if received:
        shape = (k.shape[2] // key_block, *queries.shape[:3])
        columns = _Columns(
            sums=jnp.zeros((*shape, key_block), jnp.float32),
            weights=jnp.zeros((*shape, block, key_block), jnp.float32),
            peaks=jnp.zeros((*shape, block, 1), jnp.float32),
        )
        columns = vary_like(columns, q, k, v)
    numbers = jnp.arange(queries.shape[3], dtype=jnp.int32)
    columns, (out, log_sums) = jax.lax.scan(attend, columns, numbers)
    out = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, size)[:, :, :tokens]
    log_sums = jnp.moveaxis(log_sums, 0, 3).reshape(batch, heads, -1)[:, :, :tokens]
    if columns is None:
        return out, log_sums, None
    sums = jnp.moveaxis(columns.sums, 0, 3).reshape(batch, heads, -1)[:, :, :key_tokens]
    return out, log_sums, sums


class _Columns(NamedTuple):
    """What keys receive of all blocks of queries so far, and the weights of the one at hand.

    Each leaf has the keys' blocks as its first axis.

    Attributes:
        sums: [S / C, B, J, G, C] the column sums of the blocks before.
        weights: [S / C, B, J, G, Q, C] exp(logits - peak).
        peaks: [S / C, B, J, G, Q, 1] the largest logit up to each block of keys.
    """

    sums: Float[Array, "I B J G C"]
    weights: Float[Array, "I B J G Q C"]
    peaks: Float[Array, "I B J G Q 1"]

    def remember(self, j: Array, weights: Array, peak: Array) -> _Columns:
        """Keeps the weights over block j until the sums of their rows are known."""
        return self._replace(
            weights=jax.lax.dynamic_update_index_in_dim(self.weights, weights, j, axis=0),
            peaks=jax.lax.dynamic_update_index_in_dim(self.peaks, peak, j, axis=0),
        )

    def add(self, j: Array, log_sums: Array) -> _Columns:
        """Adds the weights over block j, normalised. Rows that saw nothing there weigh 0."""
        received = jnp.einsum(
            "bjgqc,bjgq->bjgc",
            self.weights[j],
            jnp.exp(self.peaks[j] - log_sums)[..., 0],
            precision="highest",
        )
        sums = jax.lax.dynamic_update_index_in_dim(self.sums, self.sums[j] + received, j, axis=0)
        return self._replace(sums=sums)


_Carry = tuple[Array, Array, Array, _Columns | None]


def whole_blocks(x: Array, block: int, fill: float = 0) -> Array:
    """Pads axis 2 to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, -x.shape[2] % block)
    return jnp.pad(x, widths, constant_values=fill)


def block_at(x: Array, index: Array, block: int, *, axis: int) -> Array:
    """One block of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=axis)


def in_blocks(q: Float[Array, "B N T H"], sets: int, block: int) -> Float[Array, "B J G I Q H"]:
    """Queries by set of keys, head of its group and block; the last block padded with zeros."""
    batch, heads, _, size = q.shape
    return whole_blocks(q, block).reshape(batch, sets, heads // sets, -1, block, size)


def block_logits(
    rows: Float[Array, "B J G Q H"],
    keys: Float[Array, "B J C H"],
    mask: Bool[Array, "B M Q C"],
    spec: LayerSpec,
) -> Float[Array, "B J G Q C"]:
    """Logits of one block of queries over one of keys, float32, -inf where not seen."""
    sets = keys.shape[1]
    logits = jnp.einsum("bjgqh,bjch->bjgqc", rows, keys, preferred_element_type=jnp.float32)
    logits *= spec.scale  # not of the queries: those may be bfloat16
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    by_set = sets if mask.shape[1] > 1 else 1
    mask = mask.reshape(mask.shape[0], by_set, -1, *mask.shape[2:])
    return jnp.where(mask, logits, -jnp.inf)
