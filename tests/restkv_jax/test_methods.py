"""Every method against its equations in NumPy, row by row, in one padded batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.masked_eviction import select_slots
from restkv_jax.compression import score, select
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import (
    CAOTE,
    H2O,
    POLICIES,
    PRESETS,
    TOVA,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LaCache,
    Random,
    RestKV,
)
from restkv_jax.received_attention import received_attention
from tests.restkv_jax import oracle
from tests.restkv_jax.jaxprs import sizes
from tests.restkv_jax.method_equations import (
    BUDGET,
    CASES,
    GROUP,
    LENGTHS,
    SCALE,
    D,
    H,
    K,
    N,
    T,
    W,
    batch,
)


@functools.partial(jax.jit, static_argnums=0)
def score_and_select(policy, layer):
    return score(policy, layer, capacity=BUDGET), select(policy, layer, capacity=BUDGET)


POLICIES_HERE = [policy for policy, _ in CASES] + [Random(), LaCache(sinks=1, span=2)]


@pytest.mark.parametrize(("policy", "equation"), CASES, ids=[repr(policy) for policy, _ in CASES])
def test_scores_equal_numpy_and_the_top_is_kept(policy, equation):
    layer = batch()
    scores, kept = (np.asarray(x) for x in score_and_select(policy, layer))
    w_o = np.asarray(layer.w_o, np.float64)
    for row, length in enumerate(LENGTHS):
        tokens = slice(T - length, T)
        q, k, v = (np.asarray(x[row, :, tokens], np.float64) for x in (layer.q, layer.k, layer.v))
        assert (scores[row, :, : T - length] == -np.inf).all()
        ours, theirs = scores[row, :, tokens], equation(q, k, v, w_o)
        np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs))
        finite = np.isfinite(theirs)
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=2e-4, atol=1e-6)
        for head, columns in enumerate(kept[row]):
            expected = oracle.top(ours[head], min(BUDGET, length)) + T - length
            np.testing.assert_array_equal(columns[columns >= 0], expected)


@pytest.mark.parametrize("policy", POLICIES_HERE, ids=repr)
def test_no_input_makes_a_score_that_is_not_a_number(policy):
    inputs = [
        {"peak": 0.0},
        {"peak": 3e3},
        {"value": 0.0},
        {"peak": 30.0, "value": 1e4},
        {"peak": 3e3, "dtype": jnp.bfloat16},
    ]
    for options in inputs:
        scores, kept = (np.asarray(x) for x in score_and_select(policy, batch(**options)))
        assert not np.isnan(scores).any()
        if not isinstance(policy, LaCache):  # its blocks may overshoot
            filled = (kept >= 0).sum(-1)
            assert (filled == np.minimum(LENGTHS, BUDGET)[:, None]).all()


@pytest.mark.parametrize("policy", POLICIES_HERE, ids=repr)
def test_bfloat16_inputs_are_scored_in_float32(policy):
    layer = batch(dtype=jnp.bfloat16)
    arrays = (x.astype(jnp.float32) for x in (layer.q, layer.k, layer.v, layer.w_o))
    wide = layer_inputs(*arrays, lengths=layer.lengths, index=layer.index, num_layers=4)
    ours, theirs = (np.asarray(score_and_select(policy, one)[0]) for one in (layer, wide))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs))
    finite = np.isfinite(theirs)
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-4, atol=1e-6)


def test_constant_keys_are_no_trouble():
    layer = batch(peak=0.0)
    layer = layer_inputs(
        layer.q, jnp.zeros_like(layer.k), layer.v, layer.w_o, lengths=layer.lengths
    )
    for policy in (KeyDiff(), Knorm(), ExpectedAttention(), TOVA()):
        assert not np.isnan(score_and_select(policy, layer)[0]).any()


@pytest.mark.parametrize("released", [False, True])
def test_h2o_in_blocks_equals_one_product(released):
    """More queries than a block holds, and a block that they do not fill."""
    length, valid = 300, 261
    r = np.random.default_rng(0)
    shapes = (1, N, length, H), (1, K, length, H), (1, K, length, H), (N, H, D)
    q, k, v, w_o = (r.standard_normal(shape).astype(np.float32) for shape in shapes)
    layer = layer_inputs(q, k, v, w_o, lengths=jnp.asarray([valid]))
    causal_from = length - W if released else 0
    sums = received_attention(
        layer.q, layer.k, layer.lengths, spec=layer.spec, causal_from=causal_from
    )
    for n in range(N):
        rows = q[0, n, -valid:], k[0, n // GROUP, -valid:]
        if released:
            weights = oracle.non_causal_but_for_the_window(*rows, scale=SCALE, window=W)
        else:
            weights = oracle.attention(*rows, scale=SCALE)
        np.testing.assert_allclose(sums[0, n, -valid:], weights.sum(0), rtol=2e-5)
        assert (np.asarray(sums[0, n, :-valid]) == 0).all()


def test_h2o_never_holds_the_attention_matrix():
    length = 4096
    arrays = (jax.ShapeDtypeStruct((1, heads, length, H), jnp.float32) for heads in (N, K, K))
    shapes = jax.eval_shape(layer_inputs, *arrays, jax.ShapeDtypeStruct((N, H, D), jnp.float32))
    jaxpr = jax.make_jaxpr(H2O(window=W).carry)(shapes)
    assert max(sizes(jaxpr.jaxpr)) < length * length // 8


def test_h2o_asks_for_all_queries():
    layer = batch()
    part = layer_inputs(layer.q[:, :, -W:], layer.k, layer.v, layer.w_o)
    with pytest.raises(ValueError, match=r"^q\b"):
        score(H2O(window=W), part, capacity=BUDGET)


def test_random_is_by_seed_layer_head_and_position():
    draw = jax.jit(lambda seed, layer: Random(seed=seed).token_scores(layer), static_argnums=0)
    layer = batch()
    scores = np.asarray(draw(0, layer))
    np.testing.assert_array_equal(scores[0, :, :7], scores[2, :, -7:])
    assert (scores[0, 0] != scores[0, 1]).all()
    assert (np.asarray(draw(1, layer))[0] != scores[0]).all()
    other = layer_inputs(layer.q, layer.k, layer.v, layer.w_o, index=jnp.int32(2), num_layers=4)
    assert (np.asarray(draw(0, other))[0] != scores[0]).all()
    assert 0.4 < scores[0].mean() < 0.6


@pytest.mark.parametrize(
    ("options", "num_layers", "capacity"),
    [
        ({"span": 16}, 30, 64),
        ({"span": 3, "overlap": 1}, 8, 24),
        ({"span": 5, "overlap": 2, "sinks": 2}, 12, 40),
        ({"span": 2, "sinks": 0}, 6, 12),
    ],
    ids=str,
)
def test_lacache_equals_the_walk_over_its_blocks(options, num_layers, capacity):
    """All lengths at once, one row each; the ladder starts over several times."""
    policy = LaCache(**options)
    lengths = np.arange(1, 5 * capacity, 3)
    columns = 5 * capacity
    x = jnp.zeros((lengths.size, 1, columns, 1))

    @jax.jit
    def kept_sets(index):
        layer = layer_inputs(
            x, x, x, jnp.ones((1, 1, 1)), lengths=lengths, index=index, num_layers=num_layers
        )
        return select(policy, layer, capacity=capacity)[:, 0]

    walk = {"sinks": 4, "overlap": 0, **options}
    for index in (0, 1, num_layers - 1):
        for length, kept in zip(lengths, np.asarray(kept_sets(jnp.int32(index))), strict=True):
            expected = oracle.ladder(int(length), capacity, index, num_layers, **walk)
            positions = kept[kept >= 0] - (columns - length)
            np.testing.assert_array_equal(positions, expected)


def test_lacache_names_what_it_lacks():
    layer = batch()
    with pytest.raises(ValueError, match=r"^span\b"):
        score(LaCache(), layer, capacity=BUDGET)
    with pytest.raises(ValueError, match=r"^budget\b"):
        score(LaCache(span=2, sinks=8), layer, capacity=BUDGET)


def test_criticalkv_asks_for_the_output_projection():
    layer = batch()
    bare = jax.tree.map(lambda x: x, layer)
    object.__setattr__(bare, "w_o", None)
    with pytest.raises(ValueError, match=r"^w_o\b"):
        score(CriticalKV(window=W), bare, capacity=BUDGET)


def test_ties_within_a_method_go_to_the_lower_position():
    layer = batch(peak=0.0)
    same = layer_inputs(layer.q, jnp.ones_like(layer.k), jnp.ones_like(layer.v), layer.w_o)
    importance = score(TOVA(recent=1), same, capacity=BUDGET)
    kept = select_slots(importance, capacity=BUDGET, budget=jnp.full(3, BUDGET))
    np.testing.assert_array_equal(kept[0, 0], [*range(BUDGET - 1), T - 1])


def test_every_method_and_preset_is_registered():
    names = {type(policy).name for policy in POLICIES_HERE}
    assert names <= POLICIES.keys()
    assert all(name == cls.name for name, cls in POLICIES.items())
    assert PRESETS["restkv"]["robust"]() == RestKV(sinks=4, recent=12, spatial="avgpool", kernel=21)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: RestKV(sinks=-1), "sinks"),
        (lambda: TOVA(recent=-1), "recent"),
        (lambda: Knorm(sinks=-1), "sinks"),
        (lambda: ExpectedAttention(rows=0), "rows"),
        (lambda: ExpectedAttention(granularity="layer"), "granularity"),
        (lambda: ExpectedAttention(group_reduce="sum"), "group_reduce"),
        (lambda: CAOTE(temporal="median"), "temporal"),
        (lambda: CAOTE(alpha=0.0), "alpha"),
        (lambda: CriticalKV(first_stage=2.0), "first_stage"),
        (lambda: CriticalKV(epsilon=-1.0), "epsilon"),
        (lambda: LaCache(sinks=-1), "sinks"),
        (lambda: LaCache(span=0), "span"),
        (lambda: LaCache(span=4, overlap=4), "overlap"),
    ],
)
def test_bad_options_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        make()
