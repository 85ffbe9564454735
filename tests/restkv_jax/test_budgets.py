"""Budgets by layer and by head: the numbers, and that the cache allocates them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax import budget as budgets
from restkv_jax.allocation import adakv_counts
from restkv_jax.decode import CachePlan, SnapKV, Streaming, decode_step, pad_prompts, prefill
from restkv_jax.policies import H2O, LaCache
from tests.restkv_jax import dense, oracle, tiny

W, LAYERS = 4, 4


def test_pyramid_is_linear_and_spends_what_it_was_given():
    slots = [
        budgets.pyramid_slots(128, 2000, window=32, layer=layer, num_layers=30)
        for layer in range(30)
    ]
    assert slots[0] == 32 + 2 * 96 - 96 // 20
    assert len(set(np.diff(slots).tolist())) == 1
    assert 0 <= sum(slots) - 30 * 128 < 30 * 30
    short = [
        budgets.pyramid_slots(128, 2 * 96 - 1, window=32, layer=layer, num_layers=30)
        for layer in range(30)
    ]
    assert short == [128] * 30


def adakv(scores, past, floor, normalize):
    """The counts by sorting all heads' scores in one list."""
    weighed = [
        row * (np.sort(row)[::-1][:past].sum() / row.sum()) if normalize else row for row in scores
    ]
    ranked = sorted(((-x, h) for h, row in enumerate(weighed) for x in row), key=lambda t: t[0])
    counts = np.bincount([h for _, h in ranked[: len(scores) * past]], minlength=len(scores))
    return [round(float(c * (1 - floor) + int(past * floor))) for c in counts]


def test_adakv_equals_numpy_whatever_the_padding():
    slots = jax.jit(adakv_counts, static_argnames=("most", "floor", "normalize"))
    r = np.random.default_rng(0)
    scores = r.random((2, 4, 60)) ** np.array([1, 2, 4, 8])[:, None]
    padded = scores.astype(np.float32)
    padded[1, :, :25] = -np.inf
    for floor in (0.0, 0.25, 0.5):
        for normalize in (False, True):
            options = {"most": 16, "floor": floor, "normalize": normalize}
            ours = slots(jnp.asarray(padded), jnp.asarray([10, 10]), **options)
            for row, first in enumerate((0, 25)):
                theirs = adakv(scores[row, :, first:], 10, floor, normalize)
                np.testing.assert_array_equal(ours[row], theirs)
    everything = slots(jnp.asarray(padded[:1]), jnp.asarray([60]), most=60, floor=0.5)
    np.testing.assert_array_equal(everything[0], [60] * 4)


@pytest.fixture(scope="module")
def prefilled():
    model = tiny.make(layers=LAYERS)
    prompt = np.random.default_rng(0).integers(0, 61, 64).tolist()
    plans = (
        CachePlan(policy=SnapKV(window=W), budget=16, layers="pyramid", headroom=4),
        CachePlan(policy=H2O(window=W), budget=(8, 20, 8, 0.5), headroom=4),
        CachePlan(policy=LaCache(sinks=1, span=2), budget=16, headroom=4),
        CachePlan(policy=SnapKV(window=W), budget=0.25, layers="pyramid", headroom=4),
        CachePlan(policy=Streaming(), budget=(0.25, 0.2501, 16, 16), headroom=4),
    )
    rows = [prompt, prompt[:30]]
    _, caches = prefill(model, *pad_prompts(rows), plans=plans)
    return model, prompt, plans, caches


def kept(cache, layer, row=0):
    positions = np.asarray(cache.kept_positions(layer))[row]
    return [head[head >= 0].tolist() for head in positions]


def test_each_layer_holds_its_own_number_of_slots(prefilled):
    _, _, plans, caches = prefilled
    pyramid, listed = caches[:2]
    slots = [plans[0].prompt_slots(64, layer, LAYERS) for layer in range(LAYERS)]
    assert slots == [28, 20, 12, 5]  # the top layer keeps one past token at the least
    for layer, count in enumerate(slots):
        assert [len(head) for head in kept(pyramid, layer)] == [count] * 2
    assert [len(kept(listed, layer)[0]) for layer in range(LAYERS)] == [8, 20, 8, 32]
    (stack,) = listed.stacks  # one array holds them all
    assert stack.sizes == (12, 24, 12, 36)
    assert stack.k.size == 2 * 2 * 8 * (8 + 20 + 8 + 32 + 4 * LAYERS)


def test_a_ratio_in_a_pyramid_follows_each_rows_length(prefilled):
    _, _, plans, caches = prefilled
    for layer in range(LAYERS):
        capacity = plans[3].prompt_slots(64, layer, LAYERS)
        long, short = (len(kept(caches[3], layer, row)[0]) for row in (0, 1))
        assert long == capacity
        uniform = W + (round(0.25 * 30) - W) * (capacity - W) / (16 - W)
        assert abs(short - max(uniform, W + 1)) <= 0.5


def test_lacache_differs_by_layer_as_the_ladder_says(prefilled):
    _, _, _, caches = prefilled
    for layer in range(LAYERS):
        for row, length in enumerate((64, 30)):
            expected = oracle.ladder(length, 16, layer, LAYERS, sinks=1, span=2, overlap=0)
            assert kept(caches[2], layer, row) == [expected] * 2


def test_decoding_goes_on_behind_layers_of_any_size(prefilled):
    """Also where layers of one stack keep different numbers of tokens."""
    model, prompt, _, caches = prefilled
    new = [5, 17, 41]
    length = len(prompt) + len(new)
    step = jax.jit(decode_step)
    for cache in caches:
        allowed = []
        for layer, spec in enumerate(model.layer_specs):
            sets = kept(cache, layer)
            mask = np.tril(np.ones((spec.num_heads, length, length), bool))
            for n in range(spec.num_heads):
                evicted = np.setdiff1d(np.arange(64), sets[n * len(sets) // spec.num_heads])
                mask[n, len(prompt) :, evicted] = False
            allowed.append(jnp.asarray(mask)[None])
        expected = dense.logits_of(model, prompt + new, allowed)
        for i, token in enumerate(new):
            active = jnp.asarray([True, True])
            logits, cache = step(model, cache, jnp.asarray([token, token]), active)
            np.testing.assert_allclose(logits[0], expected[len(prompt) + i], atol=5e-5)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: CachePlan(policy=SnapKV(), budget=64, layers="cone"), "layers"),
        (lambda: CachePlan(policy=SnapKV(), budget=(64, 64), layers="pyramid"), "layers"),
        (lambda: CachePlan(policy=SnapKV(), budget=(64, 16)), "budget"),
        (lambda: CachePlan(policy=SnapKV(), budget=()), "budget"),
        (lambda: CachePlan(policy=SnapKV(), budget=(64, 64)).prompt_slots(99, 0, 3), "budget"),
        (lambda: CachePlan(policy=SnapKV(sinks=4), budget=36), "budget"),
    ],
)
def test_bad_plans_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        make()


def test_a_plan_is_hashable_and_compares_by_value():
    plan = CachePlan(policy=SnapKV(), budget=(64, 0.5))
    assert hash(plan) == hash(dataclasses.replace(plan))
