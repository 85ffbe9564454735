"""Reconstruction scores against NumPy in float64, and where float32 is at its worst."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.window_scores import (
    aggregated_reconstruction,
    output_factor,
    per_query_reconstruction,
    window_attention,
)
from restkv_jax.compression import score
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import RestKV, SnapKV
from restkv_jax.smoothing import temporal_weights
from tests.restkv_jax import oracle
from tests.restkv_jax.jaxprs import sizes

N, K, W, T, H, D = 6, 2, 4, 40, 8, 20
score = jax.jit(score, static_argnums=0, static_argnames="capacity")


def draw(seed=0, peak=1.0):
    r = np.random.default_rng(seed)
    q = peak * r.standard_normal((1, N, W, H))
    k, v = (r.standard_normal((1, K, T, H)) for _ in range(2))
    w_o = r.standard_normal((N, H, D)) / np.sqrt(N * H)
    return tuple(x.astype(np.float32) for x in (q, k, v, w_o))


def weights_of(q, k):
    return np.stack(
        [oracle.attention(q[0, n], k[0, n // (N // K)], scale=H**-0.5) for n in range(N)]
    )


def test_output_factor_keeps_every_norm():
    *_, w_o = draw()
    x = np.random.default_rng(1).standard_normal((N, 50, H)).astype(np.float32)
    factor = np.asarray(output_factor(jnp.asarray(w_o)))
    assert factor.shape == (N, H, H)
    ours = np.linalg.norm(np.einsum("nth,nhr->ntr", x, factor), axis=-1)
    theirs = np.linalg.norm(np.einsum("nth,nhd->ntd", x, w_o), axis=-1)
    np.testing.assert_allclose(ours, theirs, rtol=5e-6)


def test_window_attention_equals_numpy():
    q, k, _, _ = draw(peak=2.0)
    seen = np.arange(T) <= np.arange(W)[:, None] + T - W
    ours = window_attention(q, k, seen[None, None], scale=H**-0.5)
    np.testing.assert_allclose(ours[0], weights_of(q, k), atol=2e-6)


def test_per_query_form_is_what_removing_a_key_costs():
    q, k, v, w_o = draw(peak=2.0)
    weights = weights_of(q, k)
    expected = np.stack(
        [
            oracle.ema(oracle.brute_force(weights[n], v[0, n // 3].astype(float), w_o[n]), 0.3)
            for n in range(N)
        ]
    )
    ours = per_query_reconstruction(
        jnp.asarray(weights[None], jnp.float32),
        v,
        output_factor(jnp.asarray(w_o)),
        temporal_weights("ema", W, 0.3),
    )
    np.testing.assert_allclose(ours[0], expected[:, : T - W], rtol=2e-5, atol=1e-7)


def test_aggregated_form_equals_numpy():
    q, k, v, w_o = draw(peak=2.0)
    weights = weights_of(q, k)
    expected = np.stack(
        [oracle.released(weights[n], v[0, n // 3], w_o[n], 0.3, W) for n in range(N)]
    )
    averaged = np.einsum("nwt,w->nt", weights, temporal_weights("ema", W, 0.3))
    ours = aggregated_reconstruction(
        jnp.asarray(averaged[None], jnp.float32), v, output_factor(jnp.asarray(w_o)), window=W
    )
    np.testing.assert_allclose(ours[0], expected, rtol=2e-5, atol=1e-7)


def test_a_moving_average_that_goes_on_may_have_lost_keys():
    """It had weighed keys that are evicted since: it sums to less than 1, 1 - ā is 1 - ā."""
    q, k, v, w_o = draw(peak=2.0)
    past = T - W
    policy = RestKV(window=W, granularity="query_head", spatial="none", carry_over=True)
    carried = np.full((1, N, T), 0.2 / past, np.float32)  # 0.8 is lost
    carried[..., past:] = -1.0
    inputs = dataclasses.replace(layer_inputs(q, k, v, w_o), carried=jnp.asarray(carried))
    ours = score(policy, inputs, capacity=10)[0, :, :past]
    for n, weights in enumerate(weights_of(q, k)):
        rows = weights.copy()
        rows[0] = 0.3 * rows[0] + 0.7 * np.where(carried[0, n] < 0, rows[0], carried[0, n])
        expected = oracle.released(rows, v[0, n // 3], w_o[n], 0.3, W)
        np.testing.assert_allclose(ours[n], expected, rtol=2e-5, atol=1e-7)


def one_heavy_key(rest: float, heavy: int):
    """Weights that leave `rest` to all keys but one, exact in float64."""
    r = np.random.default_rng(3)
    weights = r.random(T)
    weights[heavy] = 0.0
    weights *= rest / weights.sum()
    weights[heavy] = 1.0 - rest
    return weights


@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-7, 1e-20, 0.0])
@pytest.mark.parametrize("form", ["aggregated", "per_query"])
def test_a_key_with_nearly_all_weight_keeps_its_score(form, rest):
    """The sink: 1 - A and o - v both vanish, but what its removal costs does not."""
    _, _, v, w_o = draw()
    heavy = 3
    weights = one_heavy_key(rest, heavy)
    factor = output_factor(jnp.asarray(w_o))
    values = v[0, 0].astype(np.float64)
    others = weights.copy()
    others[heavy] = 0.0
    if form == "aggregated":
        others[T - W :] = 0.0
        part = weights.copy()
        part[heavy] = 0.0
        share = part.sum()
    else:
        share = others.sum()
    without = others @ values / share if share else np.zeros(H)
    expected = weights[heavy] * np.linalg.norm((without - values[heavy]) @ w_o[0])
    given = jnp.asarray(np.broadcast_to(weights, (1, N, W, T)), jnp.float32)
    if form == "aggregated":
        ours = aggregated_reconstruction(given[:, :, 0], v, factor, window=W)
    else:
        rows = temporal_weights("mean", W, 0.3)
        ours = per_query_reconstruction(given, v, factor, rows)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[0, 0, heavy], expected, rtol=2e-5)
    assert int(jnp.argmax(ours[0, 0])) == heavy


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    peak=st.sampled_from([0.0, 1.0, 30.0, 3e3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    form=st.sampled_from(["after", "before"]),
    value=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
)
def test_scores_are_finite_whatever_the_weights(seed, peak, dtype, form, value):
    q, k, v, w_o = draw(seed, peak)
    arrays = (jnp.asarray(x, dtype) for x in (q, k, value * v, w_o))
    policy = RestKV(form=form, window=W, granularity="query_head", relative=form == "before")
    ours = score(policy, layer_inputs(*arrays), capacity=10)
    assert np.isfinite(ours[..., : T - W]).all()
    assert (ours[..., : T - W] >= 0).all()


@pytest.mark.parametrize("form", ["after", "before"])
def test_scores_scale_with_the_values(form):
    """I is in output units: twice the values, twice the score; a shift of all logits, none."""
    q, k, v, w_o = draw(peak=2.0)
    policy = RestKV(form=form, window=W, granularity="query_head")
    once = score(policy, layer_inputs(q, k, v, w_o), capacity=10)[..., : T - W]
    twice = score(policy, layer_inputs(q, k, 2 * v, w_o), capacity=10)[..., : T - W]
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


@pytest.mark.parametrize("form", ["after", "before"])
def test_nothing_as_large_as_window_times_length_times_width_is_made(form):
    """Every intermediate stays below [T, N * H], the projection that the reference makes."""
    heads, size, length, window = 8, 64, 512, 8
    shape = jax.ShapeDtypeStruct
    layer = jax.eval_shape(
        layer_inputs,
        shape((1, heads, window, size), jnp.float32),
        shape((1, 2, length, size), jnp.float32),
        shape((1, 2, length, size), jnp.float32),
        shape((heads, size, heads * size), jnp.float32),
    )
    policy = RestKV(form=form, window=window)
    jaxpr = jax.make_jaxpr(lambda layer: score(policy, layer, capacity=64))(layer)
    largest = max(sizes(jaxpr.jaxpr))
    assert largest < length * heads * size


def test_the_whole_score_of_a_head_equals_numpy():
    """Window attention, aggregation, odds x distance, pooling: from q, k, v to the score."""
    q, k, v, w_o = draw(peak=2.0)
    weights = weights_of(q, k)
    snap = score(
        SnapKV(window=W, granularity="query_head"), layer_inputs(q, k, v, w_o), capacity=10
    )
    rest = score(
        RestKV(window=W, granularity="query_head"), layer_inputs(q, k, v, w_o), capacity=10
    )
    for n in range(N):
        expected = oracle.average_pool(weights[n].sum(0)[: T - W], 5)
        np.testing.assert_allclose(snap[0, n, : T - W], expected, rtol=1e-5)
        released = oracle.released(weights[n], v[0, n // 3], w_o[n], 0.3, W)
        expected = oracle.replicate_pool(released, 5, 0)
        np.testing.assert_allclose(rest[0, n, : T - W], expected, rtol=3e-5)
