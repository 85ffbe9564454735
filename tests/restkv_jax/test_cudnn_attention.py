"""cuDNN's attention of a prompt: chosen for GPU where it can run, and what surrounds its call."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import CachePlan, LayerSpec, SnapKV, prefill
from restkv_jax.prompt_attention import causal_attention
from tests.pallas_kernels.lowering import GPU, lowered
from tests.restkv_jax import tiny

SPEC = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.3)


@pytest.fixture
def has_cudnn(monkeypatch):
    """This process has a cuDNN, as far as JAX can tell."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )


@pytest.fixture
def has_no_cudnn(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)


@pytest.fixture
def xla_for_cudnn(monkeypatch):
    """Calls meant for cuDNN go to the other implementation of the same function."""
    real = jax.nn.dot_product_attention

    def attention(*args, implementation, **options):
        assert implementation == "cudnn"
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)


def arrays(columns, dtype=jnp.float32, lengths=None):
    r = np.random.default_rng(columns)
    shapes = (3, 4, columns, 16), (3, 2, columns, 16), (3, 2, columns, 16)
    lengths = (columns, columns // 3, 1) if lengths is None else lengths
    return *(jnp.asarray(r.standard_normal(x), dtype) for x in shapes), jnp.asarray(lengths)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("columns", "rows"), [(67, 8), (5, 4), (300, 270)])
def test_equals_the_blocked_form(columns, rows, window, xla_for_cudnn):
    spec = dataclasses.replace(SPEC, window=window)
    args = arrays(columns)
    ours = causal_attention(*args, spec=spec, rows=rows, implementation="cudnn")
    expected = causal_attention(*args, spec=spec, rows=rows, implementation="xla")
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-6)
    assert np.isposinf(ours[1][2, :, :-1]).all()  # the last row holds one token
    assert (np.asarray(ours[0][2, :, :-1]) == 0).all()


def test_sums_are_those_of_the_last_queries():
    args = arrays(61)
    out, every = causal_attention(*args, spec=SPEC)
    for rows in (0, 7, 61):
        again, last = causal_attention(*args, spec=SPEC, rows=rows)
        np.testing.assert_array_equal(last, every[:, :, 61 - rows :])
        np.testing.assert_array_equal(again, out)
    with pytest.raises(ValueError, match="rows: expected 0 to T = 61, got 62"):
        causal_attention(*args, spec=SPEC, rows=62)


def text(dtype=jnp.bfloat16, kind=GPU, rows=8, columns=64, **spec):
    f = functools.partial(causal_attention, spec=dataclasses.replace(SPEC, **spec), rows=rows)
    return lowered(f, *arrays(columns, dtype), kind=kind)


def test_programs_for_gpu_call_cudnn(has_cudnn):
    found = re.findall(r'custom_call @__cudnn\$fmhaSoftmax\(.*?backend_config = "(.*?)",? ', text())
    assert len(found) == 1
    found = re.search(r'backend_config = "(.*?)", ', text(window=40))
    config = json.loads(found[1].replace("\\22", '"'))["cudnn_fmha_backend_config"]
    assert config["mask_type"] == "PADDING_CAUSAL"
    assert config["sliding_window_length"] == 40
    assert config["fmha_scale"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options",
    [{"dtype": jnp.float32}, {"softcap": 5.0}, {"rows": None}, {"kind": "TPU v5e"}],
    ids=str,
)
def test_what_cudnn_cannot_do_is_left_to_xla(options, has_cudnn):
    assert "cudnn" not in text(columns=72, **options)


def test_a_process_without_cudnn_does_without_it(has_no_cudnn):
    assert "cudnn" not in text(columns=80)
    with pytest.raises(NotImplementedError, match="'cudnn': cuDNN is not detected"):
        causal_attention(*arrays(80, jnp.bfloat16), spec=SPEC, rows=8, implementation="cudnn")
    spec = dataclasses.replace(SPEC, softcap=1.0)
    with pytest.raises(NotImplementedError, match="knows no soft cap"):
        causal_attention(*arrays(80), spec=spec, rows=8, implementation="cudnn")


def test_prefill_attends_by_cudnn_once_a_layer(has_cudnn):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.make(layers=2))
    plan = CachePlan(policy=SnapKV(window=4), budget=12)
    tokens = jnp.zeros((1, 40), jnp.int32)
    f = functools.partial(prefill, plans=(plan,))
    program = lowered(f, model, tokens, tokens == 0, kind=GPU)
    # Layers that are alike share a function that is lowered once and called twice.
    assert program.count("custom_call @__cudnn$fmhaSoftmax(") == 1
