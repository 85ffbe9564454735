"""One new entry of each row into the cache's slots on GPU, in place, all arrays in one launch.

Importing this file needs Triton. XLA writes each array by a kernel of its own, with one row by
three: it reads what is there, chooses, and writes it back. As it may write positions long before
it has keys, it also keeps versions of them: a copy of all layers' positions for each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Int, Num

from pallas_kernels.slot_write.reference import Arrays, write_slots_xla
from pallas_kernels.triton_extra import triton_call

# Arrays of one number an entry that a launch takes: positions, and the scales of int8.
_NARROW = 3
_OUTPUTS = ("_first_ptr", "_second_ptr", "_third_ptr", "_fourth_ptr", "_fifth_ptr")


def write_slots_triton(
    stacks: Arrays,
    entries: tuple[Num[Array, "B 1 J *H"], ...],
    slots: Int[Array, "B 1"],
    *,
    call: Callable[..., tuple[Array, ...]] = triton_call,
) -> Arrays:
    """See `pallas_kernels.slot_write.write_slots`; `call` launches a kernel as `triton_call` does.

    XLA writes arrays with other heads than keys and values have.
    """
    wide = [i for i, x in enumerate(stacks) if x.ndim == 4]
    heads = stacks[wide[0]].shape[1]
    narrow = [i for i, x in enumerate(stacks) if x.ndim == 3 and x.shape[1] == heads]
    chosen = wide + narrow[:_NARROW]
    rest = [i for i in range(len(stacks)) if i not in chosen]
    written: dict[int, Array] = {}
    for write, some in ((functools.partial(_write, call=call), chosen), (write_slots_xla, rest)):
        arrays = write(tuple(stacks[i] for i in some), tuple(entries[i] for i in some), slots)
        written.update(zip(some, arrays, strict=True))
    return tuple(written[i] for i in range(len(stacks)))


def _write(
    stacks: Arrays,
    entries: Arrays,
    slots: Int[Array, "B 1"],
    *,
    call: Callable[..., tuple[Array, ...]],
) -> Arrays:
    """Two arrays of entries of several numbers, then up to `_NARROW` of one."""
    batch, heads, total = stacks[0].shape[:3]
    missing = 2 + _NARROW - len(stacks)
    unused = (slots,) * missing  # not read
    sizes = [x.shape[3] for x in stacks[:2]]
    return call(
        write_kernel,
        (slots, *entries, *unused, *stacks, *unused),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stacks],
        name="write_slots",
        aliases={3 + _NARROW + i: i for i in range(len(stacks))},
        grid=(batch * heads,),
        num_warps=1,
        num_stages=1,
        heads=heads,
        total=total,
        first_size=sizes[0],
        second_size=sizes[1],
        FIRST=triton.next_power_of_2(sizes[0]),
        SECOND=triton.next_power_of_2(sizes[1]),
        narrow=len(stacks) - 2,
        **dict.fromkeys(_OUTPUTS[len(stacks) :]),
    )


@triton.jit
def put(entry_ptr, stack_ptr, head, at, size: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head's entry, of `size` numbers, to place `at`."""
    column = tl.arange(0, SIZE)
    inside = column < size
    entry = tl.load(entry_ptr + head * size + column, mask=inside)
    tl.store(stack_ptr + at * size + column, entry, mask=inside)


@triton.jit
def write_kernel(  # type: ignore[no-untyped-def]
    # Inputs.
    slots_ptr,  # [B] int32, T for entries to leave out
    first_new_ptr,  # [B * J, H]
    second_new_ptr,
    third_new_ptr,  # [B * J]
    fourth_new_ptr,
    fifth_new_ptr,
    first_ptr,  # [B * J, T, H], written to
    second_ptr,
    third_ptr,  # [B * J, T]
    fourth_ptr,
    fifth_ptr,
    # Outputs: the same arrays, or None.
    _first_ptr,
    _second_ptr,
    _third_ptr,
    _fourth_ptr,
    _fifth_ptr,
    # Static; capitals are powers of two.
    heads: tl.constexpr,
    total: tl.constexpr,
    first_size: tl.constexpr,
    second_size: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    narrow: tl.constexpr,
):
    """One head of one row."""
    head = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + head // heads)
    if slot < total:
        at = head * total + slot
        put(first_new_ptr, first_ptr, head, at, first_size, FIRST)
        put(second_new_ptr, second_ptr, head, at, second_size, SECOND)
        if narrow > 0:
            tl.store(third_ptr + at, tl.load(third_new_ptr + head))
        if narrow > 1:
            tl.store(fourth_ptr + at, tl.load(fourth_new_ptr + head))
        if narrow > 2:
            tl.store(fifth_ptr + at, tl.load(fifth_new_ptr + head))
