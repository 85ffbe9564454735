"""The Triton kernel without a GPU: interpreted, lowered and compiled to machine code."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import _without_triton, decode_attention
from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.decode_attention.tiling import gpu_tiling
from tests.pallas_kernels.lowering import lowered

needs_triton = pytest.mark.skipif(_without_triton() is not None, reason=str(_without_triton()))


@needs_triton
def test_interpreted_kernel_equals_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.triton_interpreter"]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    errors = json.loads(text.stdout)
    assert len(errors) == 4 * sum(not spec.large for spec in SPECS)
    for name, (out, weights) in errors.items():
        # Outputs of at most 4; in float16 only the weights of the second product are rounded.
        assert out < (5e-4 if "float16" in name else 2e-6), name
        assert weights < 5e-7, name


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_lowers_for_cuda(spec, dtype):
    from pallas_kernels.decode_attention.kernel_gpu import decode_attention_triton

    inputs = spec.shapes(dtype)
    run = functools.partial(
        decode_attention_triton, **spec.options, weights=True, compute_capability=90
    )
    text = lowered(run, *inputs, kind="NVIDIA H200")
    assert "triton_kernel_call" in text


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mqa_256", "gqa8_int8", "8b_1024", "8b_32k"])
def test_machine_code_fits_shared_memory(name, dtype, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.decode_attention import kernel_gpu

    (spec,) = (spec for spec in SPECS if spec.name == name)
    begin = jax.ShapeDtypeStruct((1,), jnp.int32)
    inputs = spec.shapes(dtype)
    arrays, shapes, options = _launch(kernel_gpu, inputs, begin, spec)
    names = kernel_gpu.part_kernel.arg_names
    types = {"float32": "fp32", "bfloat16": "bf16", "int8": "i8", "int32": "i32"}
    pointers = dict(zip(names, (*arrays, *shapes), strict=False))
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    static = {key: value for key, value in options.items() if key != "grid"}
    source = ASTSource(
        fn=kernel_gpu.part_kernel,
        signature={key: f"*{types[x.dtype.name]}" for key, x in pointers.items()}
        | dict.fromkeys(static, "constexpr"),
        constexprs=static,
    )
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target = GPUTarget("cuda", 90, 32)
    kernel = triton.compile(source, target, {"num_warps": warps, "num_stages": stages})
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 99 * 1024


def _launch(kernel_gpu, inputs, begin, spec):
    """`launch` of shapes alone."""
    kept = {}

    def of(*arrays):
        static = {key: spec.options[key] for key in ("scale", "softcap")}
        inputs, shapes, options = kernel_gpu.launch(*arrays, **static, weights=False, tiling=None)
        kept["options"] = options
        return inputs, tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)

    return *jax.eval_shape(of, *inputs, begin), kept["options"]


@pytest.mark.skipif(_without_triton() is None, reason="jax-triton is installed")
def test_without_the_extra_xla_does_it_and_the_name_is_refused():
    (spec,) = (spec for spec in SPECS if spec.name == "gqa3")
    inputs = spec.shapes(jnp.bfloat16)
    run = functools.partial(decode_attention, **spec.options)
    assert "custom_call" not in lowered(run, *inputs, kind="NVIDIA H200")
    with pytest.raises(NotImplementedError, match=r"'triton': jax-triton cannot be imported .*gpu"):
        lowered(functools.partial(run, implementation="triton"), *inputs, kind="NVIDIA H200")


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
