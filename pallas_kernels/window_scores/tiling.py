"""Block sizes of the window's kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.decode_attention.tiling import power_of_two

LANES = 128
# On GPU: bytes of a block of keys and of the queries in pass 1, small enough for 99 KiB of shared
# memory, what the smallest GPUs have, and for registers.
_GPU_KEYS_BYTES = 8 * 1024
_GPU_ROWS_BYTES = 32 * 1024
# Bytes of a block in pass 2, likewise.
_GPU_SCORED_BYTES = 32 * 1024
# Programs that fill a large GPU twice; more parts only add to what is combined.
_GPU_PROGRAMS = 264


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How many keys are loaded at a time.

    Attributes:
        keys: a multiple of 128 on a TPU, a power of two, at least 16, on a GPU.
        parts: of the keys that run side by side in pass 1, GPU only.
        rows: query rows of a program of pass 1, a power of two, at least 16, GPU only.
        scored: keys of a program of pass 2, a power of two, at least 16, GPU only.
        ranks: columns of the factor that the aggregated form multiplies values by at a time,
            likewise.
        num_warps: of a program, GPU only.
        num_stages: blocks that are in flight in pass 1, GPU only.
    """

    keys: int
    parts: int = 1
    rows: int = 16
    scored: int = 16
    ranks: int = 16
    num_warps: int = 8
    num_stages: int = 2

    def __post_init__(self) -> None:
        """Refuses what no kernel runs with.

        Raises:
            ValueError: naming the field.
        """
        if self.keys < 16 or self.keys % 16:
            raise ValueError(f"keys: expected a positive multiple of 16, got {self.keys}")
        for name in ("parts", "rows", "scored", "ranks", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def default_tiling(columns: int, rows: int) -> Tiling:
    """As many keys as keep a block of logits at 512 KiB, and no more than there are.

    Args:
        columns: T.
        rows: M = G · W, query rows that share a key/value head.
    """
    fitting = max(2**17 // max(rows, 1) // LANES * LANES, LANES)
    return Tiling(keys=min(fitting, 512, -(-columns // LANES) * LANES))


def gpu_tiling(*, lists: int, columns: int, rows: int, head_dim: int, dtype: Any) -> Tiling:
    """Blocks that fit shared memory, and as many parts as fill the GPU.

    Args:
        lists: B · K.
        columns: T.
        rows: M = G · W, query rows that share a key/value head.
        head_dim: H.
        dtype: of queries, keys and values.
    """
    # What is not bfloat16 is multiplied as float32.
    exact = dtype == jnp.bfloat16
    entry = power_of_two(head_dim) * (2 if exact else 4)
    keys = max(16, min(64, _GPU_KEYS_BYTES // entry))
    tile = max(16, min(power_of_two(rows), _GPU_ROWS_BYTES // entry))
    programs = lists * -(-rows // tile)
    parts = max(1, min(-(-columns // keys), _GPU_PROGRAMS // programs))
    # Tensor cores want products of at least 64 x 64, and a large block of values reads the factors
    # less often.
    scored = max(16, min(128 if exact else 64, _GPU_SCORED_BYTES // entry))
    ranks = scored if exact else 16
    return Tiling(keys=keys, parts=parts, rows=tile, scored=scored, ranks=ranks)
