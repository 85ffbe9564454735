"""The Triton kernel without a GPU: interpreted, lowered and compiled to machine code."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.decode_attention.tiling import gpu_tiling
from pallas_kernels.triton_extra import without_triton
from tests.pallas_kernels.cases import APPENDED, CASES
from tests.pallas_kernels.lowering import GPU, lowered
from tests.pallas_kernels.triton_interpreter import errors_of
from tests.pallas_kernels.triton_machine import machine_code

REASON = without_triton("decode_attention")
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@needs_triton
def test_interpreted_kernel_equals_float64():
    errors = errors_of("decode_attention")
    assert len(errors) == 4 * (len(CASES) + 2 * len(APPENDED))
    for name, (out, weights) in errors.items():
        # Outputs of at most 4; in bfloat16 they and the weights of the second product are rounded.
        assert out < (4e-3 if "bfloat16" in name else 2e-6), name
        assert weights < 5e-7, name


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_lowers_for_cuda(spec, dtype):
    inputs = spec.shapes(dtype)
    run = functools.partial(decode_attention, **spec.options, weights=True)
    assert lowered(run, *inputs, kind=GPU).count("triton_kernel_call") == 2
    if spec.sets == 1:
        text = lowered(run, *inputs, jax.eval_shape(lambda: spec.new(dtype)), kind=GPU)
        assert text.count("triton_kernel_call") == 2
        assert "scatter" not in text


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mqa_256", "gqa8_int8", "8b_1024", "8b_32k"])
def test_machine_code_fits_shared_memory(name, dtype, tmp_path, monkeypatch):
    from pallas_kernels.decode_attention.kernel_gpu import decode_attention_triton

    (spec,) = (spec for spec in SPECS if spec.name == name)
    run = functools.partial(decode_attention_triton, **spec.options, weights=False)
    args = *spec.shapes(dtype), jax.eval_shape(lambda: spec.new(dtype))
    kernels = machine_code(run, *args, folder=tmp_path, monkeypatch=monkeypatch)
    assert [kernel.name for kernel in kernels] == ["decode_attention", "decode_attention_parts"]
    for kernel in kernels:
        assert kernel.code
        assert kernel.shared <= 99 * 1024


@pytest.mark.skipif(REASON is None, reason="jax-triton is installed")
def test_without_the_extra_xla_does_it_and_the_name_is_refused():
    (spec,) = (spec for spec in SPECS if spec.name == "gqa3")
    inputs = spec.shapes(jnp.bfloat16)
    run = functools.partial(decode_attention, **spec.options)
    assert "custom_call" not in lowered(run, *inputs, kind=GPU)
    with pytest.raises(NotImplementedError, match=r"'triton': jax-triton cannot be imported .*gpu"):
        lowered(functools.partial(run, implementation="triton"), *inputs, kind=GPU)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("slots", [1, 100, 1152, 131072])
def test_splits_fill_the_gpu_with_whole_blocks(slots, head_dim, itemsize):
    for lists in (1, 8, 128, 1024):
        tiling = gpu_tiling(lists=lists, slots=slots, head_dim=head_dim, itemsize=itemsize)
        assert math.log2(tiling.block).is_integer()
        assert 16 <= tiling.block <= 128
        assert 1 <= tiling.splits <= np.ceil(slots / tiling.block)
        if lists == 8 and slots == 131072:
            assert tiling.splits == 33  # 264 programs
