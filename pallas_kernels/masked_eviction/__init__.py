"""Which columns stay, and moving them into the cache's slots."""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.masked_eviction import kernel_tpu, reference
from pallas_kernels.masked_eviction.reference import (
    Kept,
    compact,
    largest,
    select_flat,
    select_slots,
    take,
)
from pallas_kernels.masked_eviction.threshold import row_sum, top_mask
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import run_triton, without_triton

__all__ = [
    "Kept",
    "compact",
    "largest",
    "masked_eviction",
    "row_sum",
    "select_flat",
    "select_slots",
    "take",
    "top_mask",
]


def masked_eviction(
    importance: Float[Array, "B J T"],
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    positions: Int[Array, "B M T"],
    budget: Int[Array, " B"],
    *,
    capacity: int,
    implementation: Implementation | None = None,
) -> Kept:
    """Moves the entries of the `budget` largest importances of each head into C slots, in order.

    Ties, of which -0 and 0 are one, go to the lower column. What is moved is not changed, int8
    entries and their scales included.

    The reference sorts with `top_k` and gathers: it reads the C entries that stay. On a TPU a
    threshold search reads each score from HBM once, and one pass over K and V, each head's for
    its own set, moves what stays; C slots of a head must fit into VMEM. On a GPU, where `top_k`
    sorts whole rows, a threshold search comes first too, and only what stays is read; it needs
    jax-triton.

    Args:
        importance: what is lost with each column: -inf is never taken, +inf before all others.
            Not NaN.
        k: keys; set j of J reads key head j // (J / K).
        v: values.
        positions: of the columns, by head or one row for all (M = 1); below 2²⁴ on a TPU.
        budget: slots that each row of the batch may fill; more than C or T count as that many.
        capacity: C, static.
        implementation: see `dispatch`.

    Raises:
        ValueError: arrays that do not fit together.
        NotImplementedError: the implementation that was named cannot run this.
    """
    batch, heads, columns = importance.shape
    for name, x in (("k", k), ("v", v), ("positions", positions)):
        if x.shape[0] != batch or x.shape[2] != columns or heads % x.shape[1]:
            raise ValueError(
                f"{name}: expected [B, K, T, ...] with B = {batch}, T = {columns} and K a divisor "
                f"of J = {heads}, got {x.shape}"
            )
    if budget.shape != (batch,):
        raise ValueError(f"budget: expected [B] = [{batch}], got {budget.shape}")
    tpu = functools.partial(kernel_tpu.masked_eviction, capacity=capacity)

    def triton(*args: Any) -> Kept:
        kernel = run_triton("masked_eviction", "masked_eviction_triton")
        return kernel(*args, capacity=capacity)

    return dispatch(
        "masked_eviction",
        implementation,
        importance,
        k,
        v,
        positions,
        budget,
        reference=functools.partial(reference.masked_eviction, capacity=capacity),
        kernels=(
            Kernel("pallas_tpu", tpu, kernel_tpu.refusal(k, v, capacity)),
            Kernel("triton", triton, _refusal_triton(k, v, columns, capacity)),
        ),
    )


def _refusal_triton(
    k: Array | QuantArray, v: Array | QuantArray, columns: int, capacity: int
) -> str | None:
    if isinstance(k, QuantArray) != isinstance(v, QuantArray):
        return "one of k and v is int8 with scales, the other is not"
    if capacity == 0 or columns == 0:
        return "there is nothing to move"
    return without_triton("masked_eviction")
