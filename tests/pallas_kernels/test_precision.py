"""Plain XLA multiplies float32 as float32 where the default would round it: on GPU and TPU."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS as ATTENTION
from pallas_kernels.window_scores import window_scores
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
