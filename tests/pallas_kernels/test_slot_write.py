"""One new entry of each row, written in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.slot_write import write_slots
from pallas_kernels.slot_write.kernel_tpu import write_slots_tpu
from tests.pallas_kernels.lowering import (
    TOPOLOGIES,
    compiled,
    lowered,
    needs_libtpu,
)


def example(dtype, total=40, size=16, batch=4):
    r = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(r.integers(-100, 100, shape), dtype)

    # Keys with their scales, values with theirs, positions, and something for each query head.
    shapes = [(3, size), (3,), (3, 2 * size), (3,), (3,), (6,)]
    stacks = tuple(draw(batch, heads, total, *rest) for heads, *rest in shapes)
    entries = tuple(draw(batch, 1, *shape) for shape in shapes)
    stacks, entries = (
        (*arrays[:4], arrays[4].astype(jnp.int32), arrays[5].astype(jnp.float32))
        for arrays in (stacks, entries)
    )
    slots = jnp.asarray([[0], [total - 1], [total], [17 % total]], jnp.int32)[:batch]
    return stacks, entries, slots


def by_hand(stacks, entries, slots):
    stacks = [np.array(x) for x in stacks]
    for b, (slot,) in enumerate(np.asarray(slots)):
        for stack, entry in zip(stacks, entries, strict=True):
            if slot < stack.shape[2]:
                stack[b, :, slot] = np.asarray(entry)[b, 0]
    return stacks


def floats(stacks, entries, slots):
    """Without scales, nor anything for each query head."""
    return (*stacks[::2],), (*entries[::2],), slots


def carried(stacks, entries, slots):
    """What belongs to the query heads alone."""
    return stacks[-1:], entries[-1:], slots


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("total", [1, 21, 40, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_writes_each_entry_and_nothing_else(dtype, total):
    args = example(dtype, total)
    for some in (args, floats(*args), carried(*args)):
        assert_equal(write_slots(*some), by_hand(*some))
        assert_equal(write_slots_tpu(*some, interpret=True), by_hand(*some))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=str)
def test_in_the_simulator(dtype, simulator):
    args = example(dtype, 64)
    assert_equal(write_slots_tpu(*args, interpret=simulator), by_hand(*args))


def test_on_a_mesh_of_rows():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    split = PartitionSpec("data")
    args = example(jnp.float32)
    run = functools.partial(write_slots_tpu, interpret=True)
    assert_equal(
        jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(*args),
        by_hand(*args),
    )


def test_the_kernel_is_for_one_entry_of_a_row():
    stacks, entries, slots = example(jnp.float32)
    assert "tpu_custom_call" in lowered(write_slots, stacks, entries, slots)
    twice = (
        stacks,
        tuple(jnp.concatenate([x, x], axis=1) for x in entries),
        jnp.concatenate([slots] * 2, axis=1),
    )
    assert "tpu_custom_call" not in lowered(write_slots, *twice)
    with pytest.raises(NotImplementedError, match="2 entries of a row, expected 1"):
        write_slots(*twice, implementation="pallas_tpu")


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_compiles_for_tpu(dtype, kind):
    args = example(dtype, 2048, 128)
    for some in (args, carried(*args)):
        program = compiled(write_slots, *some, kind=kind)
        assert "tpu_custom_call" in program.as_text()
