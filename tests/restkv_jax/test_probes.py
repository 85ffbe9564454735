"""Queries that score apart from tokens that stay: `recent`, probes, and the rows' aggregates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.compression import score
from restkv_jax.decode import CachePlan, Full, VNorm, pad_prompts, prefill
from restkv_jax.layer import Probe
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import (
    CAOTE,
    H2O,
    Ablation,
    CriticalKV,
    DropKV,
    RestKV,
    SnapKV,
    Streaming,
)
from tests.restkv_jax import oracle, tiny

N, K, W, T, H, D, GROUP = 4, 2, 6, 40, 8, 20, 2
SCALE, BUDGET = H**-0.5, 16
LENGTHS = (40, 27)

scored = functools.partial(jax.jit, static_argnums=0)(
    lambda policy, layer: score(policy, layer, capacity=BUDGET)
)


@pytest.fixture(scope="module")
def arrays():
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal((2, heads, T, H)).astype(np.float32) for heads in (N, K, K))
    w_o = (r.standard_normal((N, H, D)) / np.sqrt(N * H)).astype(np.float32)
    return 2 * q, k, v, w_o


def whole(arrays):
    return layer_inputs(*map(jnp.asarray, arrays), lengths=jnp.asarray(LENGTHS))


def probed(arrays, rows):
    q, k, v, w_o = map(jnp.asarray, arrays)
    before, behind = (
        [x[:, :, part] for x in (q, k, v)] for part in (slice(T - rows), slice(T - rows, T))
    )
    probe = Probe(q=behind[0], k=behind[1], v=behind[2])
    return layer_inputs(*before, w_o, lengths=jnp.asarray(LENGTHS) - rows, probe=probe)


POLICIES = [
    SnapKV(window=W),
    SnapKV(window=W, sinks=2, aggregate="max", granularity="query_head"),
    RestKV(window=W),
    RestKV(window=W, form="before", spatial="none"),
    RestKV(window=W, form="before", temporal="max", relative=True),
    RestKV.robust(window=W, recent=None),
    CAOTE(window=W),
    DropKV(window=W),
    CriticalKV(window=W, aggregate="max"),
    Ablation(window=W, indicator="attn-v"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_probe_of_the_last_queries_scores_as_they_do(arrays, policy):
    """The window is one case of a probe: with nothing else forced, the scores are the same."""
    if isinstance(policy, CriticalKV):
        policy = type(policy)(**{**vars(policy), "first_stage": 0.0})
    own = np.asarray(scored(policy, whole(arrays)))[..., : T - W]
    free = type(policy)(**{**vars(policy), "recent": 0})
    np.testing.assert_allclose(scored(free, probed(arrays, W)), own, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_without_recent_the_window_stays(arrays, policy):
    same = type(policy)(**{**vars(policy), "recent": W})
    assert same.protected == policy.protected
    np.testing.assert_array_equal(scored(same, whole(arrays)), scored(policy, whole(arrays)))


def test_a_probe_may_be_longer_or_shorter_than_the_window(arrays):
    """Only the probe's last W queries count; those that it lacks weigh nothing."""
    longer = scored(SnapKV(window=W, recent=2), probed(arrays, W + 5))
    weights = oracle_weights(arrays, rows=W)[..., : T - W - 5]
    np.testing.assert_allclose(
        longer[0, :, :-2], expected_snapkv(weights, sum_of_rows, -2), rtol=2e-5
    )
    shorter = scored(SnapKV(window=3 * W, recent=2), probed(arrays, W))
    weights = oracle_weights(arrays, rows=W)[..., : T - W]
    np.testing.assert_allclose(
        shorter[0, :, :-2], expected_snapkv(weights, sum_of_rows, -2), rtol=2e-5
    )


def oracle_weights(arrays, rows):
    q, k, _, _ = arrays
    return np.stack(
        [oracle.attention(q[0, n, -rows:], k[0, n // GROUP], scale=SCALE) for n in range(N)]
    )


def sum_of_rows(weights):
    return weights.sum(1)


def max_of_rows(weights):
    return weights.max(1)


def expected_snapkv(weights, aggregate, past=None):
    scores = aggregate(weights)[:, :past]
    return np.stack([oracle.average_pool(row, 5) for row in scores]).reshape(K, GROUP, -1).mean(1)


@pytest.mark.parametrize("recent", [0, 2, W + 3])
@pytest.mark.parametrize(("aggregate", "rows"), [("sum", sum_of_rows), ("max", max_of_rows)])
def test_recent_tokens_are_forced_and_the_rest_of_the_window_is_scored(
    arrays, recent, aggregate, rows
):
    policy = SnapKV(window=W, recent=recent, aggregate=aggregate)
    assert policy.protected == recent
    ours = np.asarray(scored(policy, whole(arrays)))[0]
    past = T - recent
    assert np.isposinf(ours[:, past:]).all()
    theirs = expected_snapkv(oracle_weights(arrays, W), rows, past)
    np.testing.assert_allclose(ours[:, :past], theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("temporal", ["mean", "max"])
def test_every_querys_error_is_scored_also_inside_the_window(arrays, temporal):
    _, _, v, w_o = (np.asarray(x, np.float64) for x in arrays)
    policy = RestKV(
        window=W,
        recent=2,
        form="before",
        temporal=temporal,
        spatial="none",
        granularity="query_head",
    )
    ours = np.asarray(scored(policy, whole(arrays)))[0]
    for n, weights in enumerate(oracle_weights(arrays, W)):
        errors = oracle.brute_force(weights, v[0, n // GROUP], w_o[n])
        theirs = errors.mean(0) if temporal == "mean" else errors.max(0)
        np.testing.assert_allclose(ours[n, : T - 2], theirs[: T - 2], rtol=2e-4, atol=1e-6)


def test_the_released_form_leaves_out_what_is_not_scored(arrays):
    _, _, v, w_o = (np.asarray(x, np.float64) for x in arrays)
    policy = RestKV(window=W, recent=3, spatial="none", granularity="query_head")
    ours = np.asarray(scored(policy, whole(arrays)))[0]
    for n, weights in enumerate(oracle_weights(arrays, W)):
        theirs = oracle.released(weights, v[0, n // GROUP], w_o[n], 0.3, 3)
        np.testing.assert_allclose(ours[n, : T - 3], theirs, rtol=2e-4, atol=1e-6)


def test_h2o_counts_all_queries_of_the_prompt_whatever_is_forced(arrays):
    q, k, _, _ = arrays
    ours = np.asarray(scored(H2O(window=W, recent=1, granularity="query_head"), whole(arrays)))[0]
    sums = oracle.all_weights(q[0], k[0], scale=SCALE).sum(1)
    np.testing.assert_allclose(ours[:, :-1], sums[:, :-1], rtol=2e-5)


@pytest.mark.parametrize(
    "policy",
    [SnapKV(window=12, recent=2), RestKV(window=12, recent=2), CAOTE(window=12, recent=2)],
    ids=repr,
)
def test_prompts_shorter_than_the_window_score_as_in_a_longer_row(policy):
    model = tiny.make()
    prompt = np.random.default_rng(0).integers(0, 61, 60).tolist()
    plans = (CachePlan(policy=policy, budget=5, headroom=1),)
    _, (alone,) = prefill(model, jnp.asarray([prompt[:9]]), jnp.ones((1, 9), bool), plans=plans)
    _, (beside,) = prefill(model, *pad_prompts([prompt, prompt[:9]]), plans=plans)
    for layer in range(2):
        kept = np.asarray(alone.kept_positions(layer))[0]
        np.testing.assert_array_equal(kept, np.asarray(beside.kept_positions(layer))[1])
        assert set(kept[:, 3:5].ravel()) == {7, 8}


def test_prefill_with_a_probe_keeps_what_its_queries_find():
    model = tiny.with_windows(tiny.make(layers=3), (None, 7, None))
    r = np.random.default_rng(0)
    rows = [r.integers(0, 61, length).tolist() for length in (40, 23)]
    tokens, valid = pad_prompts(rows, columns=40)
    window = SnapKV(window=W)
    whole_plan = (CachePlan(policy=window, budget=BUDGET + W, headroom=2),)
    plans = (
        CachePlan(policy=SnapKV(window=W, recent=0), budget=BUDGET, headroom=2),
        CachePlan(policy=VNorm(sinks=1, recent=1), budget=BUDGET, headroom=2),
        CachePlan(policy=Streaming(sinks=1), budget=0.25, headroom=2),
        CachePlan(policy=Full(), headroom=2),
    )
    _, (everything,) = prefill(model, tokens, valid, plans=whole_plan)
    logits, probed = prefill(model, tokens, valid, plans=plans, probe=W)
    short, short_valid = pad_prompts([row[:-W] for row in rows], columns=40 - W)
    expected, alone = prefill(model, short, short_valid, plans=plans)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(probed[0].next_position, [40 - W, 23 - W])
    for layer in (0, 2):
        for row, length in enumerate((40, 23)):
            for head in range(2):
                ours = np.asarray(probed[0].kept_positions(layer))[row, head]
                theirs = np.asarray(everything.kept_positions(layer))[row, head]
                past = theirs[(theirs >= 0) & (theirs < length - W)]
                np.testing.assert_array_equal(ours[ours >= 0], past)
    # What looks at no query is as without the probe; so is a ring.
    for ours, theirs in zip(probed[1:], alone[1:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    with pytest.raises(ValueError, match=r"^probe\b"):
        prefill(model, tokens, valid, plans=plans, probe=40)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: SnapKV(recent=-1), "recent"),
        (lambda: SnapKV(aggregate="min"), "aggregate"),
        (lambda: RestKV(temporal="max"), "temporal"),
        (lambda: VNorm(kernel=4), "kernel"),
        (lambda: VNorm(recent=-1), "recent"),
    ],
)
def test_bad_options_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        make()
