"""What the device must at least do: bytes to move, operations to carry out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from experiments.kernel_bench import Floor
from models import ModelConfig
from models.int8_weights import as_stored
from models.weights import parameter_shapes
from restkv_jax.decode import KVCache


class Work(NamedTuple):
    """Bytes to read, and operations of matrix products (two for a multiplication and its sum)."""

    bytes: int
    flops: int

    def seconds(self, floor: Floor) -> float:
        """The larger of what the bytes and what the operations take."""
        return max(self.bytes / floor.bandwidth, self.flops / floor.flops)


def read_weights_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Of the weights that a token reads: all but the embedding, where that is not the head too."""
    shapes = parameter_shapes(config)
    if not config.tied_embeddings:
        del shapes["embed.w"]
    return sum(_stored_bytes(path, shape, dtype) for path, shape in shapes.items())


def prefill_work(config: ModelConfig, dtype: DTypeLike, batch: int, length: int) -> Work:
    """Of a prompt's forward pass: products with weights, and causal attention, half the square."""
    block, head = _multiplied(config)
    pairs = sum(_pairs(length, window) for window in config.windows)
    attention = 4 * config.num_heads * config.head_dim * pairs
    flops = batch * (2 * block * length + 2 * head + attention)
    return Work(read_weights_bytes(config, dtype), flops)


def decode_work(config: ModelConfig, dtype: DTypeLike, batch: int, cache: KVCache) -> Work:
    """Of one step: weights and the whole cache are read once, empty slots included.

    Args:
        config: of the network.
        dtype: of its weights.
        batch: rows.
        cache: arrays or shapes.
    """
    block, head = _multiplied(config)
    # The query heads that read an entry are those that share its set.
    reads = sum(
        stack.k.shape[1] * sum(stack.sizes) * config.num_heads // stack.heads
        for stack in cache.stacks
    )
    flops = batch * (2 * (block + head) + 4 * config.head_dim * reads)
    return Work(read_weights_bytes(config, dtype) + cache.kv_bytes, flops)


def _stored_bytes(path: str, shape: tuple[int, ...], dtype: DTypeLike) -> int:
    given = jax.ShapeDtypeStruct(shape, jnp.float32)
    stored = jax.eval_shape(lambda value: as_stored(path, value, dtype), given)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def _multiplied(config: ModelConfig) -> tuple[int, int]:
    """Parameters that every token is multiplied with, and those of the head."""
    shapes = parameter_shapes(config)
    shapes.pop("embed.w")
    shapes.pop("head.w", None)
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    return _numbers(matrices), config.vocab_size * config.hidden_size


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _pairs(length: int, window: int | None) -> int:
    """Σ_t min(t, window) over t = 1 ... length."""
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w
