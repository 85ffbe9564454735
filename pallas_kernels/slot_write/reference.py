"""Entries into slots in plain XLA, in place."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.bits import move

Arrays = tuple[Num[Array, "B J T *H"], ...]


def write_slots_xla(
    stacks: Arrays, entries: tuple[Num[Array, "B C J *H"], ...], slots: Int[Array, "B C"]
) -> Arrays:
    """See `pallas_kernels.slot_write.write_slots`."""
    rows = jnp.arange(slots.shape[0])[:, None]

    def write(stack: Array, entry: Array, slots: Array) -> Array:
        return stack.at[rows, :, slots].set(entry, mode="drop")

    return tuple(move(write, *pair, at=slots) for pair in zip(stacks, entries, strict=True))
