"""What is kept: the top-scored, the protected, whatever the padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.masked_eviction import row_sum, select_slots, top_mask
from pallas_kernels.masked_eviction.threshold import by_digits, by_halves
from restkv_jax.decode import (
    POLICIES,
    CachePlan,
    RestKV,
    SnapKV,
    Streaming,
    compress,
    layer_inputs,
    score,
    select,
)
from restkv_jax.policies import H2O, TOVA, Ablation, ExpectedAttention
from tests.restkv_jax import oracle

N, K, W, H, D = 4, 2, 4, 8, 20
compress, score, select = (
    jax.jit(f, static_argnums=0, static_argnames="capacity") for f in (compress, score, select)
)
SCORED = [
    SnapKV(window=W),
    SnapKV(window=W, pooling="maxpool", granularity="query_head"),
    RestKV(window=W),
    RestKV.paper(window=W, granularity="query_head"),
    RestKV(window=W, group_reduce="max", spatial="avgpool"),
    RestKV(window=W, scale=3.0),
    RestKV.robust(window=W, recent=None, kernel=7),
    H2O(window=W),
    Ablation(window=W, indicator="attn-v"),
]
EVERY = [
    *SCORED,
    TOVA(recent=1),
    ExpectedAttention(rows=8),
    Streaming(),
    POLICIES["full"](),
]


def arrays(length, seed=0, batch=1):
    r = np.random.default_rng(seed)
    shapes = (batch, N, length, H), (batch, K, length, H), (batch, K, length, H), (N, H, D)
    return [r.standard_normal(shape).astype(np.float32) for shape in shapes]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf]), min_size=12, max_size=12),
        min_size=1,
        max_size=3,
    ),
    capacity=st.integers(1, 12),
    data=st.data(),
)
def test_select_slots_takes_the_largest_and_breaks_ties_by_position(rows, capacity, data):
    budget = data.draw(st.lists(st.integers(0, capacity), min_size=len(rows), max_size=len(rows)))
    importance = jnp.asarray(rows, jnp.float32)[:, None]
    ours = np.asarray(select_slots(importance, capacity=capacity, budget=jnp.asarray(budget)))
    for row, kept, count in zip(rows, ours[:, 0], budget, strict=True):
        row = np.asarray(row)
        expected = [i for i in oracle.top(row, len(row)) if row[i] > -np.inf]
        best = sorted(expected, key=lambda i: (-row[i], i))[:count]
        expected = np.sort(np.asarray(best, int))
        np.testing.assert_array_equal(kept[: expected.size], expected)
        assert (kept[expected.size :] == -1).all()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, 1e-38, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32),
        min_size=15,
        max_size=15,
    ),
    count=st.integers(1, 15),
)
def test_top_mask_is_a_stable_sort(values, count):
    row = np.asarray(values, np.float32)
    ours = jax.jit(top_mask)(row[None], jnp.asarray([count]))[0]
    np.testing.assert_array_equal(np.flatnonzero(ours), oracle.top(row, count))
    bits = row.view(np.int32)
    for search in (by_halves, by_digits):  # whichever this platform takes
        (low,), (cut,) = jax.jit(search)(row[None], jnp.asarray([count]))
        marked = (bits > low) | ((bits == low) & (np.arange(len(row)) < cut))
        np.testing.assert_array_equal(marked, ours)


@pytest.mark.parametrize("columns", [16, 37, 256, 400, 1024])
def test_top_mask_of_rows_cut_into_strips_and_blocks(columns):
    values = np.random.default_rng(columns).integers(0, columns // 4, (6, columns)) / 64.0
    counts = np.asarray([1, 2, columns // 2, columns - 1, columns, columns * 3 // 4])
    values[3:] = [[0.0], [0.0], [1.0]]  # rows of many ties
    ours = jax.jit(top_mask)(values.astype(np.float32), counts)
    for row, count, marked in zip(values, counts, ours, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(marked), oracle.top(row, count))


@pytest.mark.parametrize("columns", [1, 15, 16, 50, 4096])
def test_row_sums_are_exact_whatever_the_width(columns):
    rows = np.random.default_rng(columns).integers(-(2**18), 2**18, (3, columns))
    ours = jax.jit(row_sum)(rows.astype(np.int32))
    assert np.array_equal(ours, rows.sum(axis=1))
    assert np.array_equal(row_sum(rows > 0), (rows > 0).sum(axis=1))


@pytest.mark.parametrize("policy", SCORED, ids=repr)
def test_kept_set_is_the_top_scored_and_holds_the_window(policy):
    length, budget = 50, 17
    layer = layer_inputs(*arrays(length))
    scores = np.asarray(score(policy, layer, capacity=budget))[0]
    kept = np.asarray(select(policy, layer, capacity=budget))[0]
    assert scores.shape[0] == (N if policy.granularity == "query_head" else K)
    for row, columns in zip(scores, kept, strict=True):
        np.testing.assert_array_equal(columns, oracle.top(row, budget))
        np.testing.assert_array_equal(columns[-W:], np.arange(length - W, length))


def test_a_group_of_query_heads_is_combined_as_stated():
    layer = layer_inputs(*arrays(50))
    per_query = score(RestKV(window=W, granularity="query_head"), layer, capacity=17)
    grouped = np.asarray(per_query).reshape(1, K, N // K, -1)[..., :-W]
    for reduce, combine in (("mean", np.mean), ("max", np.max)):
        ours = score(RestKV(window=W, group_reduce=reduce), layer, capacity=17)[..., :-W]
        np.testing.assert_allclose(ours, combine(grouped, 2), rtol=1e-6)


@pytest.mark.parametrize("policy", EVERY, ids=repr)
@pytest.mark.parametrize(("length", "padding"), [(6, 17), (23, 1), (40, 17)])
def test_padding_changes_nothing(policy, length, padding):
    budget = 12
    q, k, v, w_o = arrays(length, seed=length)
    alone = compress(policy, layer_inputs(q, k, v, w_o), capacity=budget)
    poison = np.full((1, 1, padding, H), 100.0, np.float32)

    def pad(x):
        return np.concatenate([np.repeat(poison, x.shape[1], 1), x], 2)

    padded = layer_inputs(pad(q), pad(k), pad(v), w_o, lengths=jnp.asarray([length]))
    ours = compress(policy, padded, capacity=budget)
    for one, other in zip(
        (ours.k, ours.v, ours.positions), (alone.k, alone.v, alone.positions), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("policy", EVERY, ids=repr)
def test_kept_entries_are_the_prompts_own_in_order(policy):
    length, budget = 30, 12
    q, k, v, w_o = arrays(length, batch=3)
    lengths = np.asarray([30, 12, 7])
    layer = layer_inputs(q, k, v, w_o, lengths=jnp.asarray(lengths))
    capacity = budget if policy.needs_budget else length
    ours = compress(policy, layer, capacity=capacity)
    heads = ours.positions.shape[1]
    for b, n in enumerate(lengths):
        expected = min(n, capacity)
        for j in range(heads):
            positions = np.asarray(ours.positions[b, j])
            assert (positions[:expected] >= 0).all()
            assert (positions[expected:] == -1).all()
            assert (np.diff(positions[:expected]) > 0).all()
            columns = length - n + positions[:expected]
            head = j // (heads // K)
            np.testing.assert_array_equal(ours.k[b, j, :expected], k[b, head, columns])
            np.testing.assert_array_equal(ours.v[b, j, :expected], v[b, head, columns])
            assert (np.asarray(ours.k[b, j, expected:]) == 0).all()


@pytest.mark.parametrize("policy", EVERY, ids=repr)
def test_permuting_the_batch_permutes_the_result(policy):
    q, k, v, w_o = arrays(33, batch=3)
    lengths, order = jnp.asarray([33, 20, 9]), np.asarray([2, 0, 1])
    one = select(policy, layer_inputs(q, k, v, w_o, lengths=lengths), capacity=11)
    other = select(
        policy,
        layer_inputs(q[order], k[order], v[order], w_o, lengths=lengths[order]),
        capacity=11,
    )
    np.testing.assert_array_equal(other, np.asarray(one)[order])


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 30), budget=st.integers(5, 30))
def test_streaming_in_closed_form_is_its_importance(length, budget):
    q, k, v, w_o = arrays(30)
    layer = layer_inputs(q, k, v, w_o, lengths=jnp.asarray([length]))
    counts = jnp.asarray([budget])
    importance = Streaming().importance(layer, 30, counts)
    by_score = select_slots(importance, capacity=30, budget=counts)
    np.testing.assert_array_equal(Streaming().select(layer, 30, counts), by_score)


@pytest.mark.parametrize(
    "policy", [p for p in SCORED if getattr(p, "scale", 2000.0) == 2000.0], ids=repr
)
def test_larger_budgets_keep_supersets(policy):
    """Holds where scores do not depend on the budget: not where drift widens the window."""
    layer = layer_inputs(*arrays(60))
    small = np.asarray(select(policy, layer, capacity=10))[0]
    large = np.asarray(select(policy, layer, capacity=25))[0]
    for one, other in zip(small, large, strict=True):
        assert set(one) <= set(other)


def test_ties_go_to_the_lower_position():
    q, k, v, w_o = arrays(40)
    layer = layer_inputs(q, np.ones_like(k), np.ones_like(v), w_o)
    kept = np.asarray(select(SnapKV(window=W, kernel=1), layer, capacity=10))
    np.testing.assert_array_equal(kept[0, 0], [*range(6), *range(36, 40)])


@pytest.mark.parametrize("length", [3, 4, 5, 11, 12, 13])
@pytest.mark.parametrize("policy", EVERY, ids=repr)
def test_lengths_around_window_and_budget(policy, length):
    """L below, at and above the window (4) and the budget (12)."""
    ours = compress(policy, layer_inputs(*arrays(length)), capacity=12)
    assert not np.isnan(np.asarray(ours.k)).any()
    kept = (np.asarray(ours.positions) >= 0).sum(-1)
    assert (kept == min(length, 12)).all()


def test_one_query_scores_where_no_drift_is_asked_for():
    """Its attention alone is what all temporal averages come to."""
    layer = layer_inputs(*arrays(30))
    temporal = [RestKV(window=1, spatial="none", temporal=kind) for kind in ("ema", "mean", "last")]
    first, *others = (np.asarray(score(policy, layer, capacity=9)) for policy in temporal)
    assert np.isfinite(first[..., :-1]).all()
    assert (first[..., :-1] > 0).all()
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)


def test_ratio_budgets_follow_each_rows_own_length():
    plan = CachePlan(policy=SnapKV(window=W), budget=0.25)
    assert plan.prompt_slots(96) == 24
    ours = plan.row_slots(jnp.asarray([96, 48, 10]), 96)
    np.testing.assert_array_equal(ours, [24, 12, W + 1])


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: SnapKV(window=0), "window"),
        (lambda: SnapKV(kernel=4), "kernel"),
        (lambda: SnapKV(pooling="sum"), "pooling"),
        (lambda: RestKV(alpha=0.0), "alpha"),
        (lambda: RestKV(granularity="layer"), "granularity"),
        (lambda: RestKV(form="during"), "form"),
        (lambda: RestKV(form="before", tau=2.0), "tau"),
        (lambda: RestKV(window=1), "window"),
        (lambda: Ablation(window=1), "window"),
        (lambda: RestKV(relative=True), "relative"),
        (lambda: RestKV(scale=0.0), "scale"),
        (lambda: Streaming(sinks=-1), "sinks"),
        (lambda: CachePlan(policy=RestKV(), budget=32), "budget"),
        (lambda: CachePlan(policy=RestKV(), budget=0.0), "budget"),
        (lambda: CachePlan(policy=RestKV(), budget=True), "budget"),
        (lambda: CachePlan(policy=RestKV()), "budget"),
        (lambda: CachePlan(policy=POLICIES["full"](), budget=64), "budget"),
        (lambda: CachePlan(policy=RestKV(), budget=64, headroom=-1), "headroom"),
        (lambda: layer_inputs(*arrays(9)[:3], np.zeros((N, H + 1, D))), "w_o"),
        (lambda: layer_inputs(arrays(9)[0], *arrays(8)[1:]), "q"),
    ],
)
def test_bad_options_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        make()
