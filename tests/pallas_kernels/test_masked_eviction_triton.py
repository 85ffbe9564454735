"""Eviction's Triton kernels without a GPU: interpreted, lowered and compiled to machine code."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.masked_eviction import masked_eviction
from pallas_kernels.masked_eviction.specs import SPECS
from pallas_kernels.triton_extra import without_triton
from tests.pallas_kernels.lowering import GPU, lowered
from tests.pallas_kernels.triton_interpreter import errors_of
from tests.pallas_kernels.triton_machine import machine_code

REASON = without_triton("masked_eviction")
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NAMED = {spec.name: spec for spec in SPECS}


@needs_triton
def test_interpreted_kernels_are_a_stable_sort():
    assert len(errors_of("masked_eviction")) == 2 * sum(not spec.large for spec in SPECS)


@needs_triton
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_lowers_for_cuda(spec):
    text = lowered(
        functools.partial(masked_eviction, **spec.options),
        *spec.shapes(jnp.bfloat16),
        kind=GPU,
    )
    assert text.count("triton_kernel_call") == 2
    # Nothing is sorted, and no entry is moved by XLA.
    assert "sort" not in text
    assert "gather" not in text


@needs_triton
@pytest.mark.parametrize("name", ["decode_256", "decode_int8", "8b_128k", "8b_decode"])
def test_machine_code_fits_shared_memory(name, tmp_path, monkeypatch):
    from pallas_kernels.masked_eviction.kernel_gpu import masked_eviction_triton

    spec = NAMED[name]
    run = functools.partial(masked_eviction_triton, **spec.options)
    shapes = spec.shapes(jnp.bfloat16)
    for kernel in machine_code(run, *shapes, folder=tmp_path, monkeypatch=monkeypatch):
        assert kernel.code
        assert kernel.shared <= 48 * 1024  # so that several programs share a multiprocessor


@pytest.mark.parametrize("wrong", ["mixed", "empty"])
def test_no_kernel_is_named_in_vain(wrong):
    importance, k, v, places, budget = NAMED["decode_int8"].shapes(jnp.bfloat16)
    if wrong == "mixed":
        v = NAMED["decode_256"].shapes(jnp.bfloat16)[2].update(shape=v.shape)
    run = functools.partial(
        masked_eviction, capacity=9 * (wrong == "mixed"), implementation="triton"
    )
    reason = {"mixed": "one of k and v is int8", "empty": "there is nothing to move"}[wrong]
    with pytest.raises(NotImplementedError, match=rf"masked_eviction.*'triton': {reason}"):
        lowered(run, importance, k, v, places, budget, kind=GPU)


@pytest.mark.skipif(REASON is None, reason="jax-triton is installed")
def test_without_the_extra_xla_does_it_and_the_name_is_refused():
    inputs = NAMED["by_head"].shapes(jnp.bfloat16)
    run = functools.partial(masked_eviction, capacity=9)
    assert "triton" not in lowered(run, *inputs, kind=GPU)
    with pytest.raises(NotImplementedError, match=r"'triton': jax-triton cannot be imported .*gpu"):
        lowered(functools.partial(run, implementation="triton"), *inputs, kind=GPU)
