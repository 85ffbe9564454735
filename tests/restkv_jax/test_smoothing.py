"""Pools over positions, and the drift of attention that widens them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restkv_jax.decode import layer_inputs
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.smoothing import adaptive_pool, adaptive_window, attention_drift, max_pool
from tests.restkv_jax import oracle, tiny

N, K, W, H, D = 4, 2, 4, 8, 20


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    half=st.integers(0, 6),
    shift=st.integers(-4, 4),
    first=st.integers(0, 8),
)
def test_adaptive_pool_equals_numpy(seed, half, shift, first):
    scores = np.random.default_rng(seed).random(30).astype(np.float32)
    kernel = 2 * half + 1
    one = jnp.full((1, 1), kernel), jnp.full((1, 1), shift)
    pool = jax.jit(adaptive_pool, static_argnames=("max_kernel", "max_shift"))
    ours = pool(
        jnp.asarray(scores)[None, None], jnp.asarray([first]), *one, max_kernel=15, max_shift=4
    )
    expected = oracle.replicate_pool(scores[first:].astype(float), kernel, shift)
    np.testing.assert_allclose(ours[0, 0, first:], expected, rtol=2e-6)


def test_drift_and_window_sizes_equal_numpy():
    r = np.random.default_rng(0)
    weights = r.random((1, 3, 6, 40)).astype(np.float32)
    counts = jnp.asarray([7])
    ours = attention_drift(jnp.asarray(weights), counts)
    for n in range(3):
        means = [np.argsort(-row, kind="stable")[:7].mean() for row in weights[0, n]]
        expected = np.mean(means[:3]) - np.mean(means[3:])
        np.testing.assert_allclose(ours[0, n], expected, atol=1e-5)
    drift = jnp.asarray([0.0, 0.5, 10.0, 25.0, -0.5, -10.0, -25.0])
    kernels, shifts = adaptive_window(drift, kernel=3, scale=10.0)
    np.testing.assert_array_equal(kernels, [3, 3, 3, 5, 3, 3, 5])
    np.testing.assert_array_equal(shifts, [1, 0, 1, 2, 0, 0, -2])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("handed_over", [0, W - 1, W + 2])
def test_the_drift_is_the_same_one_group_of_heads_at_a_time(monkeypatch, handed_over, softcap):
    """What accelerators do, in place of holding the weights of all heads.

    The prompt's attention may have handed over the sums of its softmax, of enough queries or not.
    """
    r = np.random.default_rng(4)
    q, k, v = (jnp.asarray(r.normal(size=(2, n, 30, H)), jnp.float32) for n in (N, K, K))
    w_o = jnp.asarray(r.normal(size=(N, H, D)), jnp.float32)
    lengths = jnp.asarray([30, 17])
    layer = layer_inputs(3 * q, k, v, w_o, lengths=lengths, softcap=softcap)
    if handed_over:
        _, sums = causal_attention(layer.q, k, v, lengths, spec=layer.spec, rows=handed_over)
        layer = dataclasses.replace(layer, log_sums=sums)
    counts = jnp.asarray([9, 5])

    def moment(weights):  # wrong sums would leave the order of a row, and so its drift, as it is
        return jnp.sum(weights * jnp.arange(30.0), axis=(-2, -1))

    weights = layer.window_weights(W)
    expected = attention_drift(weights, counts)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    ours = layer.of_window_weights(W, lambda weights: attention_drift(weights, counts))
    assert np.abs(np.asarray(expected)).max() > 1.0
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(layer.of_window_weights(W, moment), moment(weights), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_drift_reads_the_weights_where_they_are(batch):
    """On CPU its search goes over them some 25 times; a copy would be written, too."""
    weights = jax.ShapeDtypeStruct((batch, 9, 32, 4096), jnp.float32)
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(attention_drift).lower(weights, counts).compile(tiny.OPTIMISED)
    of_weights = 4 * weights.size
    assert compiled.memory_analysis().temp_size_in_bytes < of_weights / 4


def test_max_pool_equals_numpy():
    x = np.random.default_rng(0).random(20).astype(np.float32)
    valid = np.arange(20) >= 3
    ours = np.asarray(max_pool(jnp.asarray(x), jnp.asarray(valid), 5))
    masked = np.pad(np.where(valid, x, -np.inf), 2, constant_values=-np.inf)
    np.testing.assert_array_equal(ours, [masked[i : i + 5].max() for i in range(20)])
