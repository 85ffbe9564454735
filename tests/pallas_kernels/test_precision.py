"""Products keep float32 where the default would round it: on GPU and TPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS as ATTENTION
from pallas_kernels.window_scores import window_scores
from pallas_kernels.window_scores.arithmetic import three_parts
from pallas_kernels.window_scores.specs import SPECS as SCORES
from tests.pallas_kernels.lowering import GPU, lowered

OPS = [
    *((functools.partial(decode_attention, **spec.options), spec) for spec in ATTENTION),
    *((functools.partial(window_scores, form=spec.form), spec) for spec in SCORES),
]


@pytest.mark.parametrize("kind", ["TPU v5e", GPU])
@pytest.mark.parametrize(("op", "spec"), OPS, ids=lambda x: getattr(x, "name", ""))
def test_every_product(op, spec, kind):
    run = functools.partial(op, implementation="xla")
    text = lowered(run, *spec.shapes(jnp.float32), kind=kind)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_three_parts_of_bfloat16_hold_a_float32():
    x = np.random.default_rng(0).normal(size=(2, 32, 48)).astype(np.float32) ** 9
    parts = jax.jit(three_parts)(x)
    assert parts.dtype == jnp.bfloat16
    smallest, middle, largest = np.asarray(parts, np.float64)
    np.testing.assert_array_equal(smallest + middle + largest, x)
    assert np.all(np.abs(smallest) <= 2.0**-8 * np.abs(middle))
    assert np.all(np.abs(middle) <= 2.0**-8 * np.abs(largest))
