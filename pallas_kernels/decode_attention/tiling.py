"""How much of the cache a step of a kernel takes, from shapes alone."""

from __future__ import annotations

import dataclasses
import math

# On TPU: bytes of keys in one block. As much again for values, both twice while the next block is
# being fetched: 2 MiB of the 16 MiB that every generation has for a kernel by default.
_TPU_BLOCK_BYTES = 512 * 1024
# On GPU: bytes of shared memory for keys and values of all stages, of 99 KiB on the smallest.
_GPU_STAGE_BYTES = 96 * 1024
# Programs that fill a large GPU twice; more splits only add to what is combined.
_GPU_PROGRAMS = 264


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of one kernel's steps; frozen and hashable, static under `jit`.

    Attributes:
        block: slots in one step.
        splits: parts of the slots that run side by side, GPU only.
        num_warps: of a program, GPU only.
        num_stages: blocks that are in flight, GPU only.
    """

    block: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        """Refuses sizes below 1.

        Raises:
            ValueError: naming the field.
        """
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"tiling: expected {field.name} >= 1, got {getattr(self, field.name)}"
                )


def tpu_tiling(*, slots: int, head_dim: int, itemsize: int, start_multiple: int) -> Tiling | None:
    """Blocks of keys that are whole tiles and begin where the layer begins.

    Args:
        slots: S of the layer.
        head_dim: H.
        itemsize: bytes of a stored number.
        start_multiple: divides the layer's start in the array; 0 if it starts at 0.

    Returns:
        None if there is no such block; the layer must then be cut out first.
    """
    tile = 8 * 4 // itemsize  # rows: 8 of float32, 16 of bfloat16, 32 of int8
    rows = max(128, _TPU_BLOCK_BYTES // (max(head_dim, 128) * itemsize) // 128 * 128)
    if start_multiple == 0:
        return Tiling(block=min(rows, _up(slots, tile)))
    divisors = (start_multiple // n for n in range(1, start_multiple + 1) if not start_multiple % n)
    fits = [d for d in divisors if d % tile == 0 and d <= rows]
    block = max(fits, default=0)
    # A block much smaller than what could be taken costs more steps than cutting out does.
    return Tiling(block=block) if block >= min(128, _up(slots, tile)) else None


def gpu_tiling(*, lists: int, slots: int, head_dim: int, itemsize: int) -> Tiling:
    """Blocks that fit shared memory, and as many splits as fill the GPU.

    Args:
        lists: B · J.
        slots: S.
        head_dim: H.
        itemsize: bytes of a stored number.
    """
    stages = 2
    row = 2 * stages * power_of_two(head_dim) * itemsize
    block = max(16, min(128, 2 ** int(math.log2(max(1, _GPU_STAGE_BYTES // row)))))
    splits = max(1, min(-(-slots // block), _GPU_PROGRAMS // lists))
    return Tiling(block=block, splits=splits, num_stages=stages)


def power_of_two(n: int) -> int:
    """The next power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
