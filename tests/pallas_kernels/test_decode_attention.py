"""`decode_attention` and its TPU kernel, interpreted on CPU, against float64."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.decode_attention import Tiling, decode_attention
from pallas_kernels.decode_attention.kernel_tpu import decode_attention_tpu
from pallas_kernels.decode_attention.reference import decode_attention_xla
from pallas_kernels.decode_attention.specs import SPECS, Spec
from pallas_kernels.decode_attention.tiling import tpu_tiling
from tests.pallas_kernels.cases import CASES, expected, poisoned
from tests.pallas_kernels.lowering import lowered

DTYPES = (jnp.float32, jnp.bfloat16)
by_name = {spec.name: spec for spec in SPECS}
simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def assert_close(ours, theirs, dtype):
    """Outputs in bfloat16 to 8 bits of theirs, as their weights are rounded too."""
    out, weights = ours
    exact = dtype == jnp.float32
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if exact else {"rtol": 5e-3, "atol": 2e-3}
    np.testing.assert_allclose(np.asarray(out, np.float64), theirs[0], **tolerance)
    np.testing.assert_allclose(weights, theirs[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_reference_and_tpu_kernel_equal_float64(spec, dtype):
    inputs = spec.inputs(dtype)
    theirs = expected(spec, inputs)
    reference = functools.partial(decode_attention, **spec.options, weights=True)
    assert_close(jax.jit(reference)(*inputs), theirs, dtype)
    run = functools.partial(decode_attention_tpu, **spec.options, weights=True, interpret=True)
    inputs = poisoned(spec, inputs)
    assert_close(run(*inputs), theirs, dtype)


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
def test_tpu_kernel_in_the_simulator(name, dtype):
    spec = by_name[name]
    inputs = spec.inputs(dtype)
    block = Tiling(block=32) if spec.slots % 128 else Tiling(block=128)
    run = functools.partial(decode_attention_tpu, tiling=block, interpret=simulator)
    ours = run(*poisoned(spec, inputs), **spec.options, weights=True)
    assert_close(ours, expected(spec, inputs), dtype)


def test_a_traced_start_reads_the_layer_that_it_says():
    spec = dataclasses.replace(by_name["gqa3"], layers=4)
    q, k, v, visible = spec.inputs(jnp.float32)
    options = {**spec.options, "weights": True}
    del options["start"]

    @jax.jit
    def ours(layer):
        start = layer * spec.slots
        run = functools.partial(decode_attention_tpu, interpret=True, start_multiple=spec.slots)
        reference = decode_attention(q, k, v, visible, start=start, start_multiple=256, **options)
        return run(q, k, v, visible, start, **options), reference

    for layer in range(4):
        part = slice(layer * spec.slots, (layer + 1) * spec.slots)
        theirs = decode_attention_xla(q, k[:, :, part], v[:, :, part], visible, **options)
        for one in ours(layer):
            assert_close(one, [np.asarray(x, np.float64) for x in theirs], jnp.float32)


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
    q, k, v, _ = spec.inputs(jnp.float32)
    nothing = jnp.zeros((2, 3, 256), bool)
    for run in (decode_attention, functools.partial(decode_attention_tpu, interpret=True)):
        out, weights = run(q, k, v, nothing, **spec.options, weights=True)
        assert not np.any(out)
        assert not np.any(weights)


def test_weights_are_left_out_unless_asked_for():
    spec = by_name["gqa3"]
    inputs = spec.inputs(jnp.float32)
    run = functools.partial(decode_attention_tpu, **spec.options, interpret=True)
    out, nothing = run(*inputs, weights=False)
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
    assert not re.search(r"slice.*tensor<2x3x768x64xbf16>", text)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), inputs[:3])
    assert "tpu_custom_call" not in lowered(run, *half, inputs[3])
    with pytest.raises(NotImplementedError, match="q is float16, expected float32 or bfloat16"):
        lowered(functools.partial(run, implementation="pallas_tpu"), *half, inputs[3])


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
    q, k, v, visible = spec.inputs(jnp.float32)

    def loss(f, **options):
        def of(q, k, v):
            out, weights = f(q, k, v, visible, **spec.options, weights=True, **options)
            return jnp.sum(out**2) + jnp.sum(weights**2)

        return jax.grad(of, argnums=(0, 1, 2))(q, k, v)

    for one, other in zip(loss(decode_attention), loss(decode_attention_xla), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_on_a_mesh_of_rows_and_heads():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    spec = Spec(name="mesh", batch=2, heads=8, cache_heads=4, slots=96, head_dim=64, layers=2)
    inputs = spec.inputs(jnp.float32)
    split = PartitionSpec("data", "model")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    def op(*args):
        return decode_attention_tpu(*args, **spec.options, weights=True, interpret=True)

    assert_close(op(*poisoned(spec, inputs)), expected(spec, inputs), jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 3, 8, 16))}, r"k: expected \[1, a divisor of 4, slots, 16\]"),
        ({"v": jnp.zeros((1, 2, 9, 16))}, r"v: expected what k is"),
        ({"visible": jnp.ones((1, 3, 8), bool)}, r"visible: expected \[1, 2 or 4, slots\]"),
        ({"visible": jnp.ones((1, 2, 7), bool)}, r"visible: 7 slots, but k has 8, start None"),
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
        "visible": jnp.ones((1, 2, 8), bool),
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **change}, scale=1.0)


def test_tilings_have_positive_sizes():
    with pytest.raises(ValueError, match="tiling: expected splits >= 1, got 0"):
        Tiling(block=16, splits=0)
