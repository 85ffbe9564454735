"""Writing new entries into the cache's slots, in place."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.slot_write.reference import Arrays, write_slots_xla
from pallas_kernels.triton_extra import run_triton, without_triton

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
    and turns the whole array around, there and back, for every kernel that reads it; on GPU it
    takes a launch or three for each array, and copies positions. The kernels write one entry of
    each row where it is, and ask for C = 1. On TPU that is to read and write a tile, of 8 to 128
    slots, whatever the length of the array; on GPU, one launch for all arrays, but for those with
    other numbers of heads than keys and values, which XLA writes.

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

    def triton(*args: Any) -> Arrays:
        return run_triton("slot_write", "write_slots_triton")(*args)

    refusal = _refusal(stacks, slots)
    return dispatch(
        "write_slots",
        implementation,
        stacks,
        entries,
        slots,
        reference=write_slots_xla,
        kernels=(
            Kernel("pallas_tpu", tpu, refusal=refusal),
            Kernel("triton", triton, refusal=refusal or without_triton("slot_write")),
        ),
    )


def _refusal(stacks: Arrays, slots: Array) -> str | None:
    if slots.shape[1] != 1:
        return f"{slots.shape[1]} entries of a row, expected 1"
    wide = [x for x in stacks if x.ndim == 4]
    if len(wide) != 2 or wide[0].shape[1] != wide[1].shape[1]:
        return f"arrays {[x.shape for x in wide]} of keys and values, expected two of as many heads"
    for stack in wide:
        if stack.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
            return f"an array of {stack.dtype}, expected float32, bfloat16 or int8"
    return None
