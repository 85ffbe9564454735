"""Block sizes of the window's kernels."""

from __future__ import annotations

import dataclasses

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How many keys are loaded at a time.

    Attributes:
        keys: a multiple of 128 on a TPU, a power of two, at least 16, on a GPU.
    """

    keys: int

    def __post_init__(self) -> None:
        """Refuses what no kernel runs with.

        Raises:
            ValueError: naming the field.
        """
        if self.keys < 16 or self.keys % 16:
            raise ValueError(f"keys: expected a positive multiple of 16, got {self.keys}")


def default_tiling(columns: int, rows: int) -> Tiling:
    """As many keys as keep a block of logits at 512 KiB, and no more than there are.

    Args:
        columns: T.
        rows: M = G · W, query rows that share a key/value head.
    """
    fitting = max(2**17 // max(rows, 1) // LANES * LANES, LANES)
    return Tiling(keys=min(fitting, 512, -(-columns // LANES) * LANES))
