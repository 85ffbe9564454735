"""Budgets of heads: the importance against NumPy, exact sums, and caches that hold them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restkv_jax.calibration import (
    BLOCK,
    calibrate_head_budgets,
    global_counts,
    repetition_importance,
)
from restkv_jax.decode import (
    CachePlan,
    FrozenHeads,
    Streaming,
    VNorm,
    decode_step,
    extend,
    pad_prompts,
    prefill,
    with_output_factors,
)
from restkv_jax.head_budgets import HeadBudgets, apportion
from tests.restkv_jax import dense, oracle, tiny

LAYERS, N, K, GROUP = 3, 4, 2, 2


@pytest.fixture(scope="module")
def model():
    return tiny.make(layers=LAYERS, heads=N, kv_heads=K)


def texts(length, rows=1, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, length))


def recorded(model, tokens):
    """q, k, v of every layer, float64 [heads, T, H], over one row."""
    found = []
    inner = dense.dense_attend(model)

    def attend(layer, q, k, v, w_o, state):
        found.append([np.asarray(x[0], np.float64).swapaxes(0, 1) for x in (q, k, v)])
        return inner(layer, q, k, v, w_o, state)

    tokens = jnp.asarray(tokens)[None]
    model(tokens, jnp.arange(tokens.shape[1])[None], attend, None)
    return found


def importance(model, text, instruction, by):
    joint = [*text, *instruction, *text]
    rows, scale = len(joint) - len(text), model.layer_specs[0].scale
    result = []
    for layer, (q, k, v) in enumerate(recorded(model, joint)):
        w_o = np.asarray(model.params["o"][layer], np.float64)
        heads = []
        for n in range(N):
            a = oracle.attention(q[n, -rows:], k[n // GROUP], scale=scale)
            if by == "reconstruction":
                values = v[n // GROUP] @ w_o[n]
                gap = np.linalg.norm((a @ values)[:, None] - values, axis=-1)
                a = a / (1.0 - a) * gap
            heads.append(a[:, : len(text)].max(0))
        result.append(np.stack(heads).reshape(K, GROUP, -1).max(1))
    return result


@pytest.mark.parametrize("by", ["attention", "reconstruction"])
@pytest.mark.parametrize("factored", [False, True])
def test_importance_equals_numpy_over_several_blocks(model, by, factored):
    text, instruction = texts(BLOCK + 9)[0].tolist(), [3, 1, 4]
    ours = repetition_importance(
        with_output_factors(model) if factored else model,
        jnp.asarray([text]),
        jnp.asarray([instruction]),
        by=by,
    )
    for mine, theirs in zip(ours, importance(model, text, instruction, by), strict=True):
        np.testing.assert_allclose(mine[0], theirs, rtol=2e-4, atol=1e-6)


def test_shares_are_the_global_ranking_averaged_over_texts(model):
    both, sinks, recent = texts(40, rows=2), 2, 3
    found = calibrate_head_budgets(
        model, both, budget=(9, 14), by="reconstruction", sinks=sinks, recent=recent
    )
    for budget in (9, 14):
        expected = np.zeros(LAYERS * K)
        for text in both.tolist():
            rows = np.concatenate(importance(model, text, [], "reconstruction"))[:, sinks:-recent]
            ranked = sorted((-x, h) for h, row in enumerate(rows) for x in row)
            for _, head in ranked[: (budget - sinks - recent) * LAYERS * K]:
                expected[head] += 1
        np.testing.assert_allclose(found.shares[budget], expected / expected.sum(), atol=1e-12)
        np.testing.assert_array_equal(
            found.counts(budget),
            sinks + recent + apportion(expected, (budget - sinks - recent) * LAYERS * K, 35),
        )


def test_global_counts_break_ties_by_head():
    assert global_counts(np.ones((3, 4)), 6).tolist() == [4, 2, 0]


shares = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12).filter(any)


@settings(max_examples=100, deadline=None)
@given(shares=shares, most=st.integers(1, 50), part=st.floats(0, 1))
def test_apportioned_numbers_have_the_sum_and_the_order_of_their_shares(shares, most, part):
    total = int(part * most * len(shares))
    counts = apportion(np.asarray(shares), total, most)
    assert counts.sum() == total
    assert counts.min() >= 0
    assert counts.max() <= most
    order = np.argsort(shares, kind="stable")
    assert (np.diff(counts[order]) >= -1).all()


def made(heads, rows, forced=4, length=64):
    return HeadBudgets(
        by="attention",
        heads=heads,
        forced=forced,
        length=length,
        shares={
            budget: tuple((np.asarray(row) / np.sum(row)).tolist()) for budget, row in rows.items()
        },
    )


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(5, 128),
    floors=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    row=st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any),
)
def test_sums_are_exact_and_a_higher_floor_never_takes_from_the_poorest(budget, floors, row):
    budgets = made((2, 0, 2, 2), {8: [1] * 6, 32: row})
    poorest = []
    for floor in sorted(floors):
        counts = budgets.counts(budget, length=128, floor=floor)
        assert counts.sum() == budget * 6
        assert counts.min() >= budgets.forced
        assert counts.max() <= 128
        poorest.append(counts.min())
        layers = budgets.layers(budget, length=128, floor=floor)
        assert sum(layers) == budget * 4
        assert layers[1] == budget
        frozen = budgets.frozen(budget, length=128, floor=floor)
        assert [len(heads) for heads in frozen.slots] == [2, 1, 2, 2]
        assert np.concatenate([frozen.slots[i] for i in (0, 2, 3)]).tolist() == counts.tolist()
    assert poorest[0] <= poorest[1] + 1  # largest remainders may turn by one


def test_shares_follow_the_part_of_the_text_that_is_kept():
    budgets = made((2,), {8: [1, 0], 16: [1, 1]})
    assert budgets.counts(8).tolist() == [12, 4]
    assert budgets.counts(12).tolist() == [16, 8]  # half way: shares 3/4 and 1/4 of 16
    assert budgets.counts(16).tolist() == [16, 16]
    assert budgets.counts(8, length=32).tolist() == [8, 8]  # a quarter of a shorter text
    assert budgets.counts(60).tolist() == [60, 60]
    assert budgets.counts(6, length=7).tolist() == [6, 6]
    assert budgets.counts(8, length=10_000).tolist() == [12, 4]


@pytest.fixture(scope="module")
def calibrated(model):
    return calibrate_head_budgets(model, texts(48), budget=(10, 16), sinks=2, recent=2)


def kept_sets(cache, layer, row=0):
    positions, owners = (
        np.asarray(x)[row, 0] for x in (cache.kept_positions(layer), cache.owners(layer))
    )
    return [sorted(positions[(owners == head) & (positions >= 0)].tolist()) for head in range(K)]


def test_a_cache_holds_the_budgets_in_the_bytes_of_equal_ones_and_decodes_on(model, calibrated):
    policy = VNorm(sinks=2, recent=2, kernel=5)
    plan = calibrated.plan(13, policy=policy, headroom=4)
    equal = CachePlan(policy=policy, budget=13, headroom=4)
    by_layer = CachePlan(policy=policy, budget=calibrated.layers(13), headroom=4)
    prompt = texts(48, seed=1)[0].tolist()
    tokens, valid = pad_prompts([prompt, prompt[:30]])
    _, (cache, uniform, layered) = prefill(model, tokens, valid, plans=(plan, equal, by_layer))
    assert cache.kv_bytes == uniform.kv_bytes == layered.kv_bytes
    counts = calibrated.counts(13).reshape(LAYERS, K)
    assert len(set(counts.ravel().tolist())) > 2
    assert len(set(calibrated.layers(13))) > 1
    for layer in range(LAYERS):
        assert [len(head) for head in kept_sets(cache, layer)] == counts[layer].tolist()
        held = np.asarray(layered.kept_positions(layer))[0]
        assert (held >= 0).sum(-1).tolist() == [calibrated.layers(13)[layer]] * K
    new = [5, 17, 41]
    for one in (cache, layered):
        sets = [
            kept_sets(one, layer)
            if one is cache
            else [head[head >= 0].tolist() for head in np.asarray(one.kept_positions(layer))[0]]
            for layer in range(LAYERS)
        ]
        expected = dense.logits_of(model, prompt + new, allowed_by(sets, len(prompt), len(new)))
        logits, _ = extend(model, one, jnp.asarray([new, new]))
        np.testing.assert_allclose(logits[0], expected[len(prompt) :], atol=5e-5)
    both = jnp.asarray([True, True])
    step, _ = jax.jit(decode_step)(model, layered, jnp.asarray(new[:1] * 2), both)
    np.testing.assert_allclose(step[0], expected[len(prompt)], atol=5e-5)


def allowed_by(sets, length, new):
    """The prompt sees everything, the new tokens what was kept and each other."""
    masks = []
    for heads in sets:
        allowed = np.ones((1, N, length + new, length + new), bool)
        for n in range(N):
            dropped = np.setdiff1d(np.arange(length), heads[n // GROUP])
            allowed[0, n, length:, dropped] = False
        masks.append(jnp.asarray(allowed))
    return tuple(masks)


def test_layers_with_a_window_are_no_part_of_the_budget(model):
    sliding = tiny.with_windows(model, (8, None, 8))
    budgets = calibrate_head_budgets(sliding, texts(40), budget=10, sinks=1, recent=2)
    assert budgets.heads == (0, K, 0)
    assert budgets.counts(10).sum() == 10 * K
    plan = budgets.plan(10, policy=VNorm(sinks=1, recent=2), headroom=4)
    _, (cache,) = prefill(sliding, *pad_prompts(texts(40).tolist()), plans=(plan,))
    assert [cache.slots(layer) for layer in range(3)] == [8, 10 * K + 4 * K, 8]


def test_saved_budgets_come_back_for_models_of_the_same_shape_alone(calibrated, model, tmp_path):
    path = tmp_path / "heads.json"
    calibrated.save(path)
    assert HeadBudgets.load(path, model) == calibrated
    assert [file.name for file in tmp_path.iterdir()] == ["heads.json"]
    with pytest.raises(ValueError, match=r"^path\b.*heads"):
        HeadBudgets.load(path, tiny.make(layers=LAYERS + 1))
    for damaged in ("{", "[]", "{}", path.read_text().replace("shares", "parts")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"^path\b"):
            HeadBudgets.load(path, model)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"budget": 4}, "budget"),
        ({"budget": ()}, "budget"),
        ({"budget": 21}, "budget"),
        ({"budget": 8, "by": "rank"}, "by"),
        ({"budget": 8, "sinks": -1}, "sinks"),
        ({"budget": 8, "recent": 20}, "sinks"),
        ({"budget": 8, "tokens": np.zeros(20, int)}, "tokens"),
    ],
)
def test_bad_calibrations_name_the_culprit(model, options, culprit):
    options = {"tokens": texts(20), "sinks": 2, "recent": 2, **options}
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        calibrate_head_budgets(model, options.pop("tokens"), **options)


def test_budgets_that_cannot_be_met_are_refused(model, calibrated):
    for arguments in ({"budget": 4}, {"budget": 49}, {"budget": 9, "floor": 1.5}):
        with pytest.raises(ValueError, match=r"^(budget|floor)\b"):
            calibrated.counts(**arguments)
    sliding = tiny.with_windows(model, (8,) * LAYERS)
    with pytest.raises(ValueError, match=r"^model\b"):
        calibrate_head_budgets(sliding, texts(20), budget=8, sinks=1, recent=1)
    with pytest.raises(ValueError, match=r"^tokens\b.*20"):
        calibrate_head_budgets(
            tiny.with_windows(model, (20, None, None)), texts(20), budget=8, sinks=1, recent=1
        )
    with pytest.raises(ValueError, match=r"^total\b"):
        apportion(np.ones(2), 9, 4)
    narrow = FrozenHeads(slots=((4, 20), (20, 20)))
    with pytest.raises(ValueError, match=r"^heads\b.*4 slots"):
        CachePlan(policy=Streaming(sinks=6), budget=16, heads=narrow)
