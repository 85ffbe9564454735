"""`decode_attention` and its TPU kernel, interpreted on CPU, against float64."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.decode_attention import NewEntry, Tiling, decode_attention
from pallas_kernels.decode_attention.kernel_tpu import decode_attention_tpu
from pallas_kernels.decode_attention.reference import decode_attention_xla
from pallas_kernels.decode_attention.specs import SPECS, Spec
from pallas_kernels.decode_attention.tiling import tpu_tiling
from tests.pallas_kernels.cases import (
    APPENDED,
    CASES,
    appended,
    assert_written,
    expected,
    first_row_padded,
    poisoned,
)
from tests.pallas_kernels.lowering import lowered

DTYPES = (jnp.float32, jnp.bfloat16)
by_name = {spec.name: spec for spec in SPECS}


def assert_close(ours, theirs, dtype):
    """Outputs in bfloat16 to 8 bits of theirs, as their weights are rounded too."""
    out, weights = ours[:2]
    exact = dtype == jnp.float32
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if exact else {"rtol": 5e-3, "atol": 2e-3}
    np.testing.assert_allclose(np.asarray(out, np.float64), theirs[0], **tolerance)
    np.testing.assert_allclose(weights, theirs[1], rtol=1e-5, atol=1e-7)


def new_entry(size=16, rows=1):
    k = jnp.zeros((1, 2, size))
    return NewEntry(k=k, v=k, slot=jnp.zeros(rows, int))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_reference_and_tpu_kernel_equal_float64(spec, dtype):
    inputs = spec.inputs(dtype)
    theirs = expected(spec, inputs)
    reference = functools.partial(decode_attention, **spec.options, weights=True)
    assert_close(jax.jit(reference)(*inputs), theirs, dtype)
    run = functools.partial(decode_attention_tpu, **spec.options, weights=True, interpret=True)
    assert_close(run(*poisoned(spec, inputs)), theirs, dtype)


def check_appending(spec, dtype, inputs, new, poisoned_new):
    """The reference gets finite numbers, the kernel NaN in all that nobody sees."""
    theirs = expected(spec, appended(inputs, new))
    reference = functools.partial(decode_attention, **spec.options, weights=True)
    ours = jax.jit(reference)(*inputs, new)
    assert_close(ours, theirs, dtype)
    assert_written(ours[2], inputs, new)
    # The interpreter does not pad what is written to: blocks must divide it.
    tiling = Tiling(block=128) if spec.layers > 1 else None
    run = functools.partial(decode_attention_tpu, tiling=tiling, interpret=True)
    inputs = poisoned(spec, inputs, poisoned_new)
    ours = run(*inputs, poisoned_new, **spec.options, weights=True)
    assert_close(ours, theirs, dtype)
    assert_written(ours[2], inputs, poisoned_new)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", APPENDED, ids=lambda spec: spec.name)
def test_new_entries_are_written_and_seen(spec, dtype):
    new = spec.new(dtype)
    check_appending(spec, dtype, spec.inputs(dtype), new, new)


@pytest.mark.parametrize("name", ["mha", "gqa3", "gqa8_int8"])
def test_padding_does_not_see_the_entry_that_it_writes(name):
    check_appending(by_name[name], jnp.float32, *first_row_padded(by_name[name], jnp.float32))


@pytest.mark.parametrize(
    ("name", "block"),
    [("gqa3", 64), ("gqa4_ragged", 128), ("gqa8_int8", 128), ("owners", 160), ("mqa_256", 128)],
)
def test_tpu_kernel_over_several_blocks(name, block):
    spec = by_name[name]
    inputs = spec.inputs(jnp.float32)
    run = functools.partial(decode_attention_tpu, tiling=Tiling(block=block), interpret=True)
    ours = run(*poisoned(spec, inputs), **spec.options, weights=True)
    assert_close(ours, expected(spec, inputs), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gqa3", "gqa8_int8", "owners_int8"])
def test_tpu_kernel_in_the_simulator(name, dtype, simulator):
    spec = by_name[name]
    inputs = spec.inputs(dtype)
    block = Tiling(block=32) if spec.slots % 128 else Tiling(block=128)
    run = functools.partial(decode_attention_tpu, tiling=block, interpret=simulator)
    ours = run(*poisoned(spec, inputs), **spec.options, weights=True)
    assert_close(ours, expected(spec, inputs), dtype)
    if spec in APPENDED:
        new = spec.new(dtype)
        ours = run(*poisoned(spec, inputs, new), new, **spec.options, weights=True)
        assert_close(ours, expected(spec, appended(inputs, new)), dtype)
        assert_written(ours[2], poisoned(spec, inputs, new), new)


def test_a_traced_start_reads_the_layer_that_it_says():
    spec = dataclasses.replace(by_name["gqa3"], layers=4)
    q, k, v, positions, query, _ = spec.inputs(jnp.float32)
    options = {**spec.options, "weights": True}
    del options["start"]

    @jax.jit
    def ours(layer, new):
        start = layer * spec.slots
        slot = jnp.where(new.slot < spec.slots, new.slot + start, k.shape[2])
        new = dataclasses.replace(new, slot=slot)
        args = q, k, v, positions, query
        run = functools.partial(decode_attention_tpu, interpret=True, start_multiple=spec.slots)
        reference = functools.partial(decode_attention, start=start, start_multiple=256)
        return [
            op(*args, new=entry, **options)
            for op in (functools.partial(run, start=start), reference)
            for entry in (None, new)
        ]

    new = dataclasses.replace(spec.new(jnp.float32), slot=jnp.asarray([7, 255, 256]))
    for layer in range(4):
        part = slice(layer * spec.slots, (layer + 1) * spec.slots)
        cut = [x[:, :, part] for x in (k, v, positions)]
        alone = {**options, "slots": None}
        for one in ours(layer, new):
            entry = None if one[2] is None else new
            theirs = decode_attention_xla(q, *cut, query, None, entry, **alone)
            assert_close(one, [np.asarray(x, np.float64) for x in theirs[:2]], jnp.float32)
            if entry is not None:
                assert_written([x[:, :, part] for x in one[2]], (q, *cut, query, None), new)


def test_layers_that_no_block_fits_are_cut_out():
    spec = Spec(name="odd", heads=4, cache_heads=2, slots=61, head_dim=64, layers=2)
    inputs = spec.inputs(jnp.float32)
    assert tpu_tiling(slots=61, head_dim=64, itemsize=4, start_multiple=61) is None
    ours = decode_attention_tpu(
        *poisoned(spec, inputs), **spec.options, weights=True, interpret=True
    )
    assert_close(ours, expected(spec, inputs), jnp.float32)
    with pytest.raises(ValueError, match=r"tiling: blocks of 8 slots .* multiple of 61"):
        decode_attention_tpu(
            *inputs, **spec.options, weights=False, tiling=Tiling(block=8), interpret=True
        )


@pytest.mark.parametrize("multiple", [1024, 1152, 1160, 2080, 4160, 8192])
def test_blocks_are_tiles_that_divide_the_start(multiple):
    tiling = tpu_tiling(slots=multiple, head_dim=128, itemsize=2, start_multiple=multiple)
    if multiple == 1160:  # 8 · 5 · 29: no multiple of 16 divides it
        assert tiling is None
    else:
        assert multiple % tiling.block == 0
        assert tiling.block % 16 == 0
        assert 128 <= tiling.block <= 2048


def test_rows_that_see_nothing_give_zeros():
    spec = by_name["gqa3"]
    q, k, v, _, query, _ = spec.inputs(jnp.float32)
    empty = jnp.full(k.shape[:3], -1)
    for run in (decode_attention, functools.partial(decode_attention_tpu, interpret=True)):
        out, weights, _ = run(q, k, v, empty, query, **spec.options, weights=True)
        assert not np.any(out)
        assert not np.any(weights)


def test_weights_are_left_out_unless_asked_for():
    spec = by_name["gqa3"]
    inputs = spec.inputs(jnp.float32)
    run = functools.partial(decode_attention_tpu, **spec.options, interpret=True)
    out, nothing, _ = run(*inputs, weights=False)
    assert nothing is None
    np.testing.assert_array_equal(out, run(*inputs, weights=True)[0])
    assert decode_attention(*inputs, **spec.options)[1] is None


def test_the_platform_lowered_for_gets_its_kernel():
    spec = by_name["gqa3"]
    inputs = spec.shapes(jnp.bfloat16)
    run = functools.partial(decode_attention, **spec.options)
    text = lowered(run, *inputs)
    assert "tpu_custom_call" in text
    # The kernel reads the layer where it is: nothing of the array of all layers is cut out.
    assert not re.search(r"slice.*tensor<3x3x768x64xbf16>", text)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), inputs[:3])
    assert "tpu_custom_call" not in lowered(run, *half, *inputs[3:])
    with pytest.raises(NotImplementedError, match="q is float16, expected float32 or bfloat16"):
        lowered(functools.partial(run, implementation="pallas_tpu"), *half, *inputs[3:])


@pytest.mark.parametrize("name", ["gqa3", "gqa8_int8", "owners"])
def test_the_program_for_cpu_is_the_references(name):
    spec = by_name[name]
    inputs = spec.shapes(jnp.float32)

    def program(f):
        def op(*args):
            return f(*args, **spec.options)

        text = jax.jit(op).lower(*inputs).compile().as_text()
        text = re.sub(r", metadata=\{[^}]*\}|, backend_config=\{.*\}", "", text)
        # Names end in counters, and the traceback's tables follow the program.
        return re.sub(r"[._]\d+", "", text[text.index("ENTRY") :]).split("\n\n")[0]

    reference = functools.partial(decode_attention_xla, weights=False)
    assert program(decode_attention) == program(reference)


def test_derivatives_are_the_references():
    spec = by_name["gqa8_96"]
    q, k, v, *rest = spec.inputs(jnp.float32)

    def loss(f):
        def of(q, k, v, new):
            out, weights, cache = f(q, k, v, *rest, new, **spec.options, weights=True)
            return jnp.sum(out**2) + jnp.sum(weights**2) + jnp.sum(cache.k**3)

        return jax.tree.leaves(
            jax.grad(of, argnums=(0, 1, 2, 3), allow_int=True)(q, k, v, spec.new(jnp.float32))
        )[:-1]

    for one, other in zip(loss(decode_attention), loss(decode_attention_xla), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_on_a_mesh_of_rows_and_heads():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    spec = Spec(name="mesh", batch=2, heads=8, cache_heads=4, slots=96, head_dim=64, layers=2)
    inputs, new = spec.inputs(jnp.float32), spec.new(jnp.float32)
    rows, split = PartitionSpec("data"), PartitionSpec("data", "model")
    entry = NewEntry(k=split, v=split, slot=rows)

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(*(split,) * 4, rows, None, entry),
        out_specs=split,
        check_vma=False,
    )
    def op(*args):
        return decode_attention_tpu(*args, **spec.options, weights=True, interpret=True)

    theirs = expected(spec, appended(inputs, new))
    inputs = poisoned(spec, inputs, new)
    ours = op(*inputs, new)
    assert_close(ours, theirs, jnp.float32)
    assert_written(ours[2], inputs, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 3, 8, 16))}, r"k: expected \[1, a divisor of 4, slots, 16\]"),
        ({"v": jnp.zeros((1, 2, 9, 16))}, r"v: expected what k is"),
        ({"positions": jnp.zeros((1, 2, 7), int)}, r"positions: expected \(1, 2, 8\) as k"),
        ({"owners": jnp.zeros((1, 4, 8), int)}, r"owners: expected \(1, 2, 8\) as k"),
        ({"query": jnp.zeros((2,), int)}, r"query: expected a position for each of 1 rows"),
        ({"sets": 2}, r"sets: expected 1, or a divisor of 2 and owners, got 2"),
        ({"slots": 8}, r"slots: expected up to 8, with start None, got 8"),
        ({"slots": 9, "start": 0}, r"slots: expected up to 8, with start 0, got 9"),
        (
            {"new": new_entry(), "owners": jnp.zeros((1, 2, 8), int)},
            r"new: expected None for lists with owners",
        ),
        ({"new": new_entry(size=17)}, r"new.k: expected \(1, 2, 16\), stored as k is"),
        ({"new": new_entry(rows=2)}, r"new.slot: expected one for each of 1 rows"),
        ({"tiling": Tiling(block=8)}, r"tiling: expected None for implementation None"),
        ({"implementation": "cuda"}, r"implementation: expected None or one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "q": jnp.zeros((1, 4, 16)),
        "k": jnp.zeros((1, 2, 8, 16)),
        "v": jnp.zeros((1, 2, 8, 16)),
        "positions": jnp.zeros((1, 2, 8), int),
        "query": jnp.zeros(1, int),
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **change}, scale=1.0)


def test_tilings_have_positive_sizes():
    with pytest.raises(ValueError, match="tiling: expected splits >= 1, got 0"):
        Tiling(block=16, splits=0)
