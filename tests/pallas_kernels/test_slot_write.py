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
from pallas_kernels.triton_extra import without_triton
from tests.pallas_kernels.lowering import (
    GPU,
    TOPOLOGIES,
    compiled,
    lowered,
    needs_cuda_plugin,
    needs_libtpu,
)
from tests.pallas_kernels.triton_interpreter import errors_of
from tests.pallas_kernels.triton_machine import machine_code

REASON = without_triton("slot_write")
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


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


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("total", [1, 21, 40, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_writes_each_entry_and_nothing_else(dtype, total):
    args = example(dtype, total)
    for some in (args, floats(*args)):
        assert_equal(write_slots(*some), by_hand(*some))
        assert_equal(write_slots_tpu(*some, interpret=True), by_hand(*some))


@needs_triton
def test_interpreted_kernel_writes_each_entry_and_nothing_else():
    errors = errors_of("slot_write")
    assert len(errors) == 3 * 2
    assert not any(errors.values())


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


def test_the_kernels_are_for_one_entry_of_a_row():
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
    with pytest.raises(NotImplementedError, match="keys and values, expected two of as many heads"):
        write_slots(stacks[1:], entries[1:], slots, implementation="triton")


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_one_launch_on_gpu(dtype):
    args = example(dtype)
    text = lowered(write_slots, *args, kind=GPU)
    assert text.count("triton_kernel_call") == 1
    assert text.count('"stablehlo.scatter"(') == 1  # what belongs to the query heads
    assert '"stablehlo.scatter"(' not in lowered(write_slots, *floats(*args), kind=GPU)


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=str)
def test_machine_code(dtype, tmp_path, monkeypatch):
    from pallas_kernels.slot_write.kernel_gpu import write_slots_triton

    args = example(dtype)
    if dtype != jnp.int8:
        args = floats(*args)
    (kernel,) = machine_code(write_slots_triton, *args, folder=tmp_path, monkeypatch=monkeypatch)
    assert kernel.code
    assert kernel.shared == 0


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_compiles_for_tpu(dtype, kind):
    program = compiled(write_slots, *example(dtype, 2048, 128), kind=kind)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.gpu_aot
@needs_cuda_plugin
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
def test_compiles_for_gpu(dtype):
    args = floats(*example(dtype, 2048, 128))
    program = compiled(write_slots, *args, kind=GPU, donate_argnums=0)
    assert "triton_kernel_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 4096
