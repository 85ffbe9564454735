"""The Triton kernels of `window_scores` without a GPU: interpreted, lowered and compiled."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.triton_extra import without_triton
from pallas_kernels.window_scores import ScoreForm, Tiling, window_scores
from pallas_kernels.window_scores.specs import SPECS
from pallas_kernels.window_scores.tiling import gpu_tiling
from tests.pallas_kernels.lowering import GPU, lowered
from tests.pallas_kernels.triton_interpreter import errors_of
from tests.pallas_kernels.triton_machine import machine_code

REASON = without_triton("window_scores")
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NAMED = {spec.name: spec for spec in SPECS}


@needs_triton
def test_interpreted_kernels_equal_the_reference():
    errors = errors_of("window_scores")
    assert len(errors) == 2 * sum(not spec.large for spec in SPECS) + 2 + 4
    for name, error in errors.items():
        assert error < 3e-5, name


@needs_triton
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_lowers_for_cuda(spec):
    inputs = spec.shapes(jnp.bfloat16)
    text = lowered(functools.partial(window_scores, form=spec.form), *inputs, kind=GPU)
    # Averaged weights and their distances are launches of their own.
    assert text.count("triton_kernel_call") == (3 if spec.form.kind == "aggregated" else 2)
    if spec.large:
        # Nothing has a number for each row of the window and each key.
        assert f"x{spec.window}x{spec.columns}xf32" not in text
        # Nor is there any other array of the size of the keys than keys and scores.
        assert f"{spec.columns}x{spec.head_dim}xf32" not in text


@needs_triton
def test_known_sums_spare_the_first_pass():
    spec = NAMED["attention"]
    sums = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)

    def op(*args):
        return window_scores(*args[:-1], log_sums=args[-1], form=spec.form)

    text = lowered(op, *spec.shapes(jnp.bfloat16), sums, kind=GPU)
    assert text.count("triton_kernel_call") == 1


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gqa3_80", "wide_256", "8b_8k", "8b_128k_paper"])
def test_machine_code_fits_shared_memory(name, dtype, tmp_path, monkeypatch):
    from pallas_kernels.window_scores.kernel_gpu import window_scores_triton

    spec = NAMED[name]
    run = functools.partial(window_scores_triton, log_sums=None, form=spec.form)
    shapes = spec.shapes(dtype)
    for kernel in machine_code(run, *shapes, folder=tmp_path, monkeypatch=monkeypatch):
        assert kernel.code
        assert kernel.shared <= 99 * 1024, kernel.name


@needs_triton
def test_distances_are_large_products_of_bfloat16(tmp_path, monkeypatch):
    """Of float32 as such, tensor cores would take TF32, and registers a few columns at a time."""
    from pallas_kernels.window_scores.kernel_gpu import window_scores_triton

    spec = NAMED["8b_8k"]
    run = functools.partial(window_scores_triton, log_sums=None, form=spec.form)
    inputs = spec.shapes(jnp.bfloat16)
    *_, last = machine_code(run, *inputs, folder=tmp_path, monkeypatch=monkeypatch)
    assert last.name == "window_scores_aggregated"
    products = set(re.findall(r"wgmma\.mma_async[\w.]*\.(m\d+n\d+k\d+\.\w+\.\w+)", last.assembly))
    assert products == {"m64n128k16.f32.bf16"}
    assert last.shared <= 64 * 1024  # two programs and more for each multiprocessor


def shapes(dtype=jnp.bfloat16, *, window=8, size=64, k_dtype=None):
    x = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    k = jax.ShapeDtypeStruct((1, 2, 40, size), k_dtype or dtype)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    mean = jax.ShapeDtypeStruct((window,), jnp.float32)
    places = integers((1, window)), integers((1, 1, 40))
    return x((1, 4, window, size)), k, None, None, mean, *places


@pytest.mark.parametrize(
    ("arrays", "past", "reason"),
    [
        (shapes(jnp.int8), 30, "q is int8, not float32, bfloat16 or float16"),
        (shapes(k_dtype=jnp.float32), 30, "k is float32 with heads of 64, other than q"),
        (shapes(window=200), 30, "a window of 200 or heads of 64 do not fit"),
        (shapes(size=512), 30, "a window of 8 or heads of 512 do not fit"),
        (shapes(), 0, "there is nothing to score"),
    ],
    ids=["type", "types", "window", "size", "past"],
)
def test_no_kernel_is_named_in_vain(arrays, past, reason):
    form = ScoreForm(kind="attention", past=past, scale=1.0)

    def op(q, k, mean, queries, places, implementation=None):
        args = q, k, None, None, mean, queries, places
        return window_scores(*args, form=form, implementation=implementation)

    given = [x for x in arrays if x is not None]
    with pytest.raises(NotImplementedError, match=rf"window_scores.*'triton': {reason}"):
        jax.eval_shape(functools.partial(op, implementation="triton"), *given)
    assert "triton" not in lowered(op, *given, kind=GPU)


@needs_triton
@pytest.mark.parametrize("bad", [{"keys": 48}, {"keys": 16, "rows": 8}])
def test_blocks_are_powers_of_two(bad):
    spec = NAMED["mha_64"]
    run = functools.partial(
        window_scores, form=spec.form, implementation="triton", tiling=Tiling(**bad)
    )
    with pytest.raises(ValueError, match=r"tiling\.(keys|rows): expected a power of two"):
        jax.eval_shape(run, *spec.shapes(jnp.bfloat16))


@pytest.mark.skipif(REASON is None, reason="jax-triton is installed")
def test_without_the_extra_xla_does_it_and_the_name_is_refused():
    spec = NAMED["gqa8_128"]
    inputs = spec.shapes(jnp.bfloat16)
    run = functools.partial(window_scores, form=spec.form)
    assert "triton" not in lowered(run, *inputs, kind=GPU)
    with pytest.raises(NotImplementedError, match=r"'triton': jax-triton cannot be imported .*gpu"):
        lowered(functools.partial(run, implementation="triton"), *inputs, kind=GPU)


def test_tilings_are_powers_of_two_that_fill_the_gpu():
    for columns, rows, size, dtype in (
        (131072, 128, 128, jnp.bfloat16),
        (100, 60, 80, jnp.float32),
        (9, 1, 256, jnp.float16),
    ):
        tiling = gpu_tiling(lists=8, columns=columns, rows=rows, head_dim=size, dtype=dtype)
        for number in (tiling.keys, tiling.rows, tiling.scored, tiling.ranks):
            assert number >= 16
            assert number & (number - 1) == 0
        assert 1 <= tiling.parts <= max(1, -(-columns // tiling.keys))
    eight = gpu_tiling(lists=8, columns=131072, rows=128, head_dim=128, dtype=jnp.bfloat16)
    # One program holds all rows of a group: each key is loaded once.
    assert eight == Tiling(keys=32, parts=33, rows=128, scored=128, ranks=128)
    with pytest.raises(ValueError, match="parts: expected at least 1, got 0"):
        Tiling(keys=16, parts=0)
