"""Writing new entries into the cache's slots, in place."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.slot_write.reference import Arrays, write_slots_xla

__all__ = ["write_slots"]


def write_slots(
    stacks: Arrays,
    entries: tuple[Num[Array, "B C J *H"], ...],
    slots: Int[Array, "B C"],
    *,
    implementation: Implementation | None = None,
) -> Arrays:
    """Writes C entries of each row at the slots of their own.

    XLA writes scattered rows in place, but on TPU it wants the heads beside each other for that
    and turns the whole array around, there and back, for every kernel that reads it. The kernel
    writes one entry of each row where it is, and asks for C = 1: it reads and writes a tile, of 8
    to 128 slots, whatever the length of the array. What is attended to in the same step is better
    written by `decode_attention`.

    Args:
        stacks: arrays with the same B and T; keys and values, and others without H, such as their
            positions.
        entries: what goes into each of them; they are cast to its type.
        slots: numbers below T, or T for entries to leave out; those of a row differ.
        implementation: None for the platform's best, see `dispatch`.

    Returns:
        The arrays with the entries in them.

    Raises:
        NotImplementedError: the implementation that was named cannot run this, and why.
    """
    entries = tuple(x.astype(y.dtype) for x, y in zip(entries, stacks, strict=True))

    def tpu(*args: Any) -> Arrays:
        from pallas_kernels.slot_write.kernel_tpu import write_slots_tpu

        return write_slots_tpu(*args)

    return dispatch(
        "write_slots",
        implementation,
        stacks,
        entries,
        slots,
        reference=write_slots_xla,
        kernels=(Kernel("pallas_tpu", tpu, refusal=_refusal(stacks, slots)),),
    )


def _refusal(stacks: Arrays, slots: Array) -> str | None:
    if slots.shape[1] != 1:
        return f"{slots.shape[1]} entries of a row, expected 1"
    for stack in stacks:
        if stack.ndim == 4 and stack.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
            return f"an array of {stack.dtype}, expected float32, bfloat16 or int8"
    return None
