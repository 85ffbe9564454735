"""What several Triton kernels share. Importing this file needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_cap(x, cap: tl.constexpr):  # type: ignore[no-untyped-def]
    """`cap` · tanh(x / `cap`) by exp(-2|x|), which cannot overflow; x itself if `cap` is 0."""
    if cap != 0.0:
        bent = x / cap
        power = tl.exp(-2.0 * tl.abs(bent))
        x = cap * tl.where(bent < 0.0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)
    return x


@triton.jit
def load_entries(ptr, at, wanted, size: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of `size` numbers, zeros in what is not wanted."""
    number = tl.arange(0, SIZE)
    inside = wanted[:, None] & (number < size)[None, :]
    return tl.load(ptr + at[:, None].to(tl.int64) * size + number[None, :], mask=inside, other=0.0)
