"""One new entry of each row, written in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.slot_write import write_slots
from pallas_kernels.slot_write.kernel_tpu import write_slots_tpu
from tests.pallas_kernels.lowering import TOPOLOGIES, compiled, lowered, needs_libtpu

simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def example(dtype, total=40, size=16, batch=4):
    r = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(r.integers(-100, 100, shape), dtype)

    stacks = draw(batch, 3, total, size), draw(batch, 3, total, 2 * size)
    entries = draw(batch, 1, 3, size), draw(batch, 1, 3, 2 * size)
    slots = jnp.asarray([[0], [total - 1], [total], [17 % total]], jnp.int32)[:batch]
    return stacks, entries, slots


def by_hand(stacks, entries, slots):
    stacks = [np.array(x) for x in stacks]
    for b, (slot,) in enumerate(np.asarray(slots)):
        for stack, entry in zip(stacks, entries, strict=True):
            if slot < stack.shape[2]:
                stack[b, :, slot] = np.asarray(entry)[b, 0]
    return stacks


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("total", [1, 21, 40, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_writes_each_entry_and_nothing_else(dtype, total):
    args = example(dtype, total)
    assert_equal(write_slots(*args), by_hand(*args))
    assert_equal(write_slots_tpu(*args, interpret=True), by_hand(*args))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=str)
def test_in_the_simulator(dtype):
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
    twice = [jnp.concatenate([x, x], axis=1) for x in entries], jnp.concatenate([slots] * 2, axis=1)
    assert "tpu_custom_call" not in lowered(write_slots, stacks, tuple(twice[0]), twice[1])
    with pytest.raises(NotImplementedError, match="2 entries of a row, expected 1"):
        write_slots(stacks, tuple(twice[0]), twice[1], implementation="pallas_tpu")


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_compiles_for_tpu(dtype, kind):
    program = compiled(write_slots, *example(dtype, 2048, 128), kind=kind)
    assert "tpu_custom_call" in program.as_text()
