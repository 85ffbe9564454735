"""Products of bfloat16, which CPUs would compute from a float32 copy of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.matmul import matmul


def example(rows, dtype, transposed=False):
    r = np.random.default_rng(0)
    x = jnp.asarray(r.standard_normal((*rows, 96)), dtype)
    w = jnp.asarray(r.standard_normal((80, 96) if transposed else (96, 80)), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w.T if transposed else w, np.float64)
    return x, w, exact


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (1, 1), (2, 1), (1, 5), (2, 3)], ids=str)
def test_sums_in_float32(rows, dtype, transposed):
    x, w, exact = example(rows, dtype, transposed)
    run = jax.jit(matmul, static_argnames=("dtype", "transposed"))
    with jax.numpy_dtype_promotion("strict"):
        wide = run(x, w, dtype=jnp.float32, transposed=transposed)
        rounded = run(x, w, transposed=transposed)
    assert wide.shape == exact.shape
    # Products of bfloat16 are exact in float32: only the order of 96 additions differs.
    np.testing.assert_allclose(wide, exact, atol=2e-5)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, wide.astype(dtype))


@pytest.mark.parametrize("rows", [(1, 1), (1, 7)], ids=str)
def test_derivatives(rows):
    x, w, _ = example(rows, jnp.bfloat16)
    of_x, of_w = jax.grad(lambda x, w: jnp.sum(matmul(x, w, jnp.float32)), (0, 1))(x, w)
    assert (of_x.dtype, of_w.dtype) == (jnp.bfloat16, jnp.bfloat16)
    w64, x64 = np.asarray(w, np.float64), np.asarray(x, np.float64)
    np.testing.assert_allclose(of_x[0, 0].astype(np.float32), w64.sum(1), atol=0.1, rtol=2**-8)
    np.testing.assert_allclose(of_w[:, 0].astype(np.float32), x64.sum((0, 1)), rtol=2**-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_loops_hold_no_float32_copy_of_the_weights(rows, transposed):
    def steps(x, w):
        return jax.lax.scan(
            lambda x, _: (jnp.tanh(matmul(x, w, transposed=transposed)), None), x, length=4
        )[0]

    x = jax.ShapeDtypeStruct((rows, 1, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    program = jax.jit(steps).lower(x, w).compile()
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512 * 2
    assert "f32[512,512]" not in program.as_text()


def test_one_row_of_float64_is_summed_in_float64_on_gpu():
    with jax.enable_x64(True):
        args = jax.ShapeDtypeStruct((1, 1, 96), float), jax.ShapeDtypeStruct((96, 80), float)
        program = jax.jit(matmul).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "(tensor<2x96xf64>, tensor<96x80xf64>) -> tensor<2x80xf64>" in program
