"""Splash attention: what surrounds its call, its mask, and that programs for TPU hold it."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restkv_jax import splash_attention
from restkv_jax.decode import CachePlan, LayerSpec, SnapKV, prefill
from restkv_jax.prompt_attention import causal_attention
from tests.pallas_kernels.lowering import GPU, lowered
from tests.restkv_jax import tiny

SPEC = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.3)
TPU = "TPU v5e"


def arrays(columns, dtype=jnp.float32):
    r = np.random.default_rng(columns)
    shapes = (3, 4, columns, 16), (3, 2, columns, 16), (3, 2, columns, 16)
    lengths = jnp.asarray((columns, columns // 3, 1))
    return *(jnp.asarray(r.standard_normal(x), dtype) for x in shapes), lengths


def both(columns, dtype, spec):
    """By splash attention, and by blocks in float32 of the same numbers."""
    *qkv, lengths = arrays(columns, dtype)
    ours = splash_attention.causal_attention(*qkv, lengths, spec=spec, interpret=True)
    exact = (x.astype(jnp.float32) for x in qkv)
    return ours, causal_attention(*exact, lengths, spec=spec, implementation="xla")[0]


# 67 and 300 columns leave a part of a tile; 1,100 make nine tiles, of which some are empty.
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("columns", [67, 300, 1100])
def test_equals_the_blocked_form(columns, window, softcap):
    ours, expected = both(
        columns, jnp.float32, dataclasses.replace(SPEC, window=window, softcap=softcap)
    )
    np.testing.assert_allclose(ours, expected, atol=3e-6, rtol=2e-6)
    assert (np.asarray(ours[2, :, :-1]) == 0).all()  # the last row holds one token


@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_bfloat16_is_rounded_at_its_ends(scale):
    ours, expected = both(300, jnp.bfloat16, dataclasses.replace(SPEC, scale=scale))
    assert ours.dtype == jnp.bfloat16
    # Of the result; and of the scaled queries unless the scale is a power of two.
    tolerance = 2**-8 if scale == 0.25 else 2**-6
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=tolerance, rtol=2**-8)


@given(
    columns=st.integers(1, 6).map(lambda tiles: 8 * tiles),
    window=st.none() | st.integers(1, 60),
)
def test_tiles_know_what_they_hold(columns, window):
    mask = splash_attention._PromptMask(columns, window)
    dense = np.asarray(mask.mask_function(*np.ogrid[:columns, :columns]))
    for i in range(0, columns, 8):
        for j in range(0, columns, 8):
            tile = slice(i, i + 8), slice(j, j + 8)
            assert mask[tile].any() == dense[tile].any()
            assert mask[tile].all() == dense[tile].all()
    assert dense.sum() == sum(min(n + 1, window or columns) for n in range(columns))


@given(st.integers(1, 200_000))
def test_tiles_add_an_eighth_or_are_the_smallest(columns):
    block = splash_attention.block_size(columns)
    assert block == 128 or -columns % block <= columns / 8
    assert columns < 8192 or block == 1024


def text(columns, dtype=jnp.bfloat16, kind=TPU, rows=8, **spec):
    f = functools.partial(causal_attention, spec=dataclasses.replace(SPEC, **spec), rows=rows)
    return lowered(f, *arrays(columns, dtype), kind=kind)


@pytest.mark.parametrize("spec", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_programs_for_tpu_hold_it(spec):
    assert text(64, **spec).count("custom_call @tpu_custom_call") == 1


@pytest.mark.parametrize(
    "options", [{"dtype": jnp.float32}, {"rows": None}, {"kind": GPU}], ids=str
)
def test_what_it_should_not_do_is_left_to_xla(options):
    assert "tpu_custom_call" not in text(columns=72, **options)


def test_a_named_refusal_says_why():
    with pytest.raises(NotImplementedError, match="'splash': its products round float32"):
        causal_attention(*arrays(80), spec=SPEC, rows=8, implementation="splash")
    with pytest.raises(NotImplementedError, match="the sums of all queries are asked for"):
        causal_attention(*arrays(80, jnp.bfloat16), spec=SPEC, implementation="splash")


def test_prefill_attends_by_it_once_a_layer():
    model = tiny.cast(tiny.make(layers=2), jnp.bfloat16)
    plan = CachePlan(policy=SnapKV(window=4), budget=12)
    tokens = jnp.zeros((1, 40), jnp.int32)
    f = functools.partial(prefill, plans=(plan,))
    program = lowered(f, model, tokens, tokens == 0)
    # Layers that are alike share a function that is lowered once and called twice.
    assert program.count('kernel_name = "splash_mha_fwd') == 1
