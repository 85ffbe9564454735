"""Attention of a prompt over itself on TPU, by the splash attention that comes with JAX."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from pallas_kernels.varying import varying_axes
from restkv_jax.protocols import LayerSpec

# Queries and keys of a tile, the largest first; no smaller one fills the lanes.
_BLOCKS = (1024, 512, 256, 128)


def causal_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """The outputs of `restkv_jax.prompt_attention.causal_attention`, padding's at 0.

    Padding is a segment of its own, which nobody else looks at. The kernel scales nothing: the
    queries are scaled before it, and round to their type once more unless the scale is a power of
    two.
    """
    columns = q.shape[2]
    block = block_size(columns)
    behind = -columns % block  # what the last tile is short of comes after every query
    q = (q * spec.scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, behind), (0, 0))) for x in (q, k, v))
    is_token = jnp.arange(columns + behind) >= columns - lengths[:, None]
    kernel = _kernel(q.shape[1], q.shape[2], block, spec.window, spec.softcap, interpret)
    segments = is_token.astype(jnp.int32)
    # Mosaic compiles no products of bfloat16 in a higher precision, which would not differ either.
    with jax.default_matmul_precision("default"):
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return jnp.where(is_token[:, None, :, None], out, 0)[:, :, :columns]


def refusal(q: Any) -> str | None:
    """Why splash attention should not attend here, None if it should.

    Args:
        q: queries, of which only the type is looked at.
    """
    if q.dtype.itemsize != 2:
        return f"its products round {q.dtype} to bfloat16"
    if axes := varying_axes(q):
        return f"JAX's kernel does not pass check_vma of the jax.shard_map over {sorted(axes)}"
    return None


def block_size(columns: int) -> int:
    """The largest tile that adds an eighth of the columns at most, else the smallest."""
    fitting = (block for block in _BLOCKS if 8 * (-columns % block) <= columns)
    return next(fitting, _BLOCKS[-1])


@dataclasses.dataclass(frozen=True)
class _PromptMask(splash.Mask):
    """A query sees its own column and those before, or the last `window` of them.

    JAX's own masks write out each of the tiles, a minute's work for a prompt of 128k. The kernel
    computes the mask from `mask_function`; all that tiles are asked is whether they hold anything.
    """

    columns: int
    window: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.columns, self.columns

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.columns, dtype=np.int32)

    def mask_function(self, query: Any, key: Any) -> Any:
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)

    def __getitem__(self, tile: tuple[slice, slice]) -> np.ndarray:
        """Of a tile whether it holds anything, and whether it is full, in place of its entries."""
        queries, keys = tile
        nearest, farthest = queries.start - (keys.stop - 1), (queries.stop - 1) - keys.start
        window = self.columns if self.window is None else self.window
        return np.array([farthest >= 0 and nearest < window, nearest >= 0 and farthest < window])


@functools.cache
def _kernel(
    heads: int,
    columns: int,
    block: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([_PromptMask(columns, window)] * heads),
            block_sizes=splash.BlockSizes(block_q=block, block_kv=block),
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
    # Copies: views would keep arrays on the device alive.
    return jax.tree.map(np.array, kernel)
