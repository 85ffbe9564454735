"""Prompts in pieces, several tokens at once on a cache, and int8 storage."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.quantized import dequantize, quantize
from restkv_jax.decode import (
    H2O,
    TOVA,
    AdaKV,
    CachePlan,
    ExpectedAttention,
    Full,
    LaCache,
    RestKV,
    SharedBudget,
    SnapKV,
    Streaming,
    continue_from,
    decode_step,
    extend,
    last_logits,
    pad_prompts,
    prefill,
    prefill_bounded,
    prefill_chunked,
    score_tokens,
)
from restkv_jax.feed import feed
from tests.restkv_jax import dense, tiny

W = 4
ROWS = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (50, 21)]
PLANS = (
    CachePlan(policy=Full(), headroom=8),
    CachePlan(policy=Streaming(), budget=12, headroom=8),
    CachePlan(policy=RestKV(window=W), budget=12, headroom=8),
    CachePlan(policy=RestKV.paper(window=W, granularity="query_head"), budget=12, headroom=8),
    CachePlan(policy=H2O(window=W), budget=12, decode_budget=10),
    CachePlan(policy=RestKV(window=W, carry_over=True), budget=0.3, decode_budget=10),
    CachePlan(policy=TOVA(), budget=12, headroom=8),
    CachePlan(policy=LaCache(sinks=1, span=1), budget=12, headroom=8),
    CachePlan(policy=ExpectedAttention(rows=8), budget=12, layers="pyramid", headroom=8),
    CachePlan(policy=RestKV(window=W), budget=12, heads=SharedBudget(), headroom=8),
    CachePlan(policy=SnapKV(window=W), budget=12, heads=AdaKV(), headroom=8),
    CachePlan(policy=SnapKV(window=W), budget=12, storage="int8", headroom=8),
)


@pytest.fixture(scope="module")
def model():
    return tiny.make(layers=2)


@pytest.fixture(scope="module")
def whole(model):
    return prefill(model, *pad_prompts(ROWS), plans=PLANS)


@pytest.mark.parametrize("windows", [(None, None), (9, None)], ids=str)
def test_chunked_prefill_keeps_what_the_whole_one_keeps(model, whole, windows):
    logits, caches = whole
    if windows != (None, None):
        model = tiny.with_windows(model, windows)
        logits, caches = prefill(model, *pad_prompts(ROWS), plans=PLANS)
    ours, chunked = prefill_chunked(model, *pad_prompts(ROWS), plans=PLANS, piece=10)
    np.testing.assert_allclose(ours, logits, atol=2e-5)
    for plan, one, other in zip(PLANS, caches, chunked, strict=True):
        ours, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
        assert ours[1] == theirs[1], plan
        for x, y in zip(ours[0], theirs[0], strict=True):
            if x.dtype == jnp.float32:
                np.testing.assert_allclose(x, y, atol=3e-5, err_msg=repr(plan))
            elif x.dtype == jnp.int8:  # a level may tip over
                assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1
            else:  # positions, owners, cursors
                np.testing.assert_array_equal(x, y, err_msg=repr(plan))


def test_a_policy_that_needs_all_queries_at_once_is_refused(model):
    plan = CachePlan(policy=H2O(window=W, released=True), budget=12)
    with pytest.raises(ValueError, match="all queries"):
        prefill_chunked(model, *pad_prompts(ROWS), plans=(plan,), piece=10)
    with pytest.raises(ValueError, match="piece"):
        prefill_chunked(model, *pad_prompts(ROWS), plans=(), piece=0)


def test_bounded_prefill_with_room_for_all_is_exact(model, whole):
    plan = CachePlan(policy=RestKV(window=W), budget=64, headroom=8)
    logits, cache = prefill_bounded(model, *pad_prompts(ROWS), plan=plan, piece=16)
    np.testing.assert_allclose(logits, whole[0], atol=2e-5)
    assert cache.slots(0) == 64 + 16


def test_bounded_prefill_sees_what_earlier_pieces_left(model):
    """Logits equal full attention under the mask of what was held piece by piece."""
    (prompt,) = ROWS[:1]
    plan, piece = CachePlan(policy=SnapKV(window=W), budget=12, headroom=4), 10
    total = len(prompt)
    allowed = [np.tril(np.ones((4, total, total), bool)) for _ in range(2)]
    for end in range(piece, total, piece):
        _, cache = prefill_bounded(model, *pad_prompts([prompt[:end]]), plan=plan, piece=piece)
        for layer in range(2):
            kept = np.asarray(cache.kept_positions(layer))[0]
            for head in range(4):
                evicted = np.setdiff1d(np.arange(end), kept[head // 2])
                allowed[layer][head, end:, evicted] = False
    logits, cache = prefill_bounded(model, *pad_prompts([prompt]), plan=plan, piece=piece)
    expected = dense.logits_of(model, prompt, [jnp.asarray(mask)[None] for mask in allowed])
    np.testing.assert_allclose(logits[0], expected[-1], atol=3e-5)
    assert {cache.slots(layer) for layer in range(2)} == {12 + piece}
    assert (np.asarray(cache.kept_positions(0)) >= 0).sum(-1).max() == 12


@pytest.mark.parametrize(
    ("budget", "decode_budget", "piece", "slots"),
    [(12, 30, 8, 30 + 6), (30, 12, 6, 30 + 6), (12, 14, 20, 12 + 20), (12, 30, 30, 12 + 30)],
)
def test_a_bounded_prefill_leaves_the_room_to_decode_that_a_whole_one_does(
    model, budget, decode_budget, piece, slots
):
    """More only where a piece needs it; the newest token is always held."""
    plan = CachePlan(
        policy=SnapKV(window=W), budget=budget, decode_budget=decode_budget, evict_every=6
    )
    prompt = pad_prompts(ROWS[:1])
    logits, cache = prefill_bounded(model, *prompt, plan=plan, piece=piece)
    _, (exact,) = jax.eval_shape(lambda: prefill(model, *prompt, plans=(plan,)))
    assert [cache.slots(layer) for layer in range(2)] == [slots] * 2
    assert slots == max(exact.slots(0), budget + piece)
    assert cache.room >= exact.room >= plan.evict_every
    out = continue_from(model, logits, cache, headroom=0, max_new_tokens=40, chunk=40)
    for layer in range(2):
        kept = np.asarray(out.cache.kept_positions(layer))[0]
        newest = int(out.cache.next_position[0]) - 1
        for head in kept:
            assert set(range(newest - W, newest + 1)) <= set(head.tolist())
            assert (head >= 0).sum() >= decode_budget


def test_memory_of_a_bounded_prefill_does_not_grow_with_the_prompt(model):
    plan = CachePlan(policy=SnapKV(window=W), budget=64, headroom=4)
    shape = jax.ShapeDtypeStruct

    def temporary(columns):
        lowered = prefill_bounded.lower(
            model, shape((1, columns), jnp.int32), shape((1, columns), bool), plan=plan, piece=64
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(8192)
    assert long - short < 16 * (8192 - 1024)  # the tokens themselves, no K/V (256 bytes a token)


@pytest.mark.parametrize(
    "options", [{"budget": 0.5}, {"layers": "pyramid"}, {"heads": AdaKV()}, {"budget": (9, 9)}]
)
def test_plans_that_only_the_end_can_tell_are_refused(model, options):
    plan = CachePlan(**{"policy": SnapKV(window=W), "budget": 12, **options})
    with pytest.raises(ValueError, match="bounded"):
        prefill_bounded(model, *pad_prompts(ROWS), plan=plan, piece=16)


@pytest.mark.parametrize("which", range(len(PLANS)), ids=lambda i: repr(PLANS[i])[:60])
def test_extending_is_feeding_one_by_one_and_leaves_the_cache_alone(model, whole, which):
    cache = whole[1][which]
    tokens, valid = np.array([[7, 8, 9, 10], [0, 3, 4, 0]]), np.ones((2, 4), bool)
    valid[1] = [False, True, True, False]
    before = jax.tree.map(jnp.copy, cache)
    logits, extended = extend(model, cache, jnp.asarray(tokens), jnp.asarray(valid))
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, y)
    step = jax.jit(decode_step)
    for t in range(4):
        active = jnp.asarray(valid[:, t])
        out, cache = step(model, cache, jnp.asarray(tokens[:, t]), active)
        np.testing.assert_allclose(logits[valid[:, t], t], out[valid[:, t]], atol=2e-5)
    np.testing.assert_array_equal(extended.next_position, cache.next_position)
    for layer in range(2):
        np.testing.assert_array_equal(extended.kept_positions(layer), cache.kept_positions(layer))
    last = last_logits(logits, jnp.asarray(valid))
    np.testing.assert_array_equal(last, np.stack([logits[0, 3], logits[1, 2]]))


@pytest.mark.parametrize("windows", [(None, None), (6, None)], ids=str)
def test_scores_of_given_answers_are_those_of_full_attention(model, windows):
    model = tiny.with_windows(model, windows)
    logits, (cache,) = prefill(model, *pad_prompts(ROWS), plans=PLANS[:1])
    answers = np.array([[5, 17, 41, 2, 8, 9], [3, 3, 9, 0, 0, 0]])
    valid = np.arange(6) < np.array([[6], [3]])
    ours, _ = score_tokens(model, logits, cache, jnp.asarray(answers), jnp.asarray(valid))
    for row, prompt in enumerate(ROWS):
        answer = answers[row][valid[row]].tolist()
        all_logits = dense.logits_of(model, prompt + answer)[len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(all_logits)[np.arange(len(answer)), answer]
        np.testing.assert_allclose(ours[row, : len(answer)], expected, atol=3e-5)
        assert not np.asarray(ours)[row, len(answer) :].any()


def test_free_counts_down_to_the_first_token_that_is_lost(model, whole):
    """Of every kind of cache: every layer holds as many tokens as it says, and not one more."""
    _, caches = whole
    for plan, cache in zip(PLANS, caches, strict=True):
        free = np.asarray(cache.free)
        if plan.decode_budget is not None:
            np.testing.assert_array_equal(free, cache.room)
            continue
        assert (free >= plan.headroom).all()
        most = int(free.max())
        for more in (0, 1):
            tokens = jnp.ones((2, most + more), jnp.int32)
            valid = jnp.arange(most + more) < jnp.asarray(free)[:, None] + more
            _, after = jax.jit(feed)(model, cache, tokens, valid)
            for row in range(2):
                newest = int(cache.next_position[row] + free[row]) + more - 1
                held = [(after.kept_positions(i)[row] == newest).any() for i in range(2)]
                assert all(held) == (not more), plan
            np.testing.assert_array_equal(after.free[valid.sum(1) == free], 0)


def test_more_tokens_than_there_is_room_for_are_refused(model, whole):
    with pytest.raises(ValueError, match="tokens"):
        extend(model, whole[1][1], jnp.zeros((2, 40), jnp.int32))
    with pytest.raises(ValueError, match="tokens"):  # 64 slots behind a decode budget
        extend(model, whole[1][4], jnp.zeros((2, 70), jnp.int32))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_int8_is_within_half_a_step_and_keeps_its_levels(seed, exponent):
    x = np.random.default_rng(seed).standard_normal((3, 16)) * 2.0**exponent
    x[1] = 0.0
    stored = quantize(jnp.asarray(x, jnp.float32))
    back = np.asarray(dequantize(stored, jnp.float32))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(back - x) <= 0.5001 * step + 1e-30).all()
    assert np.abs(np.asarray(stored.values, int)).max() <= 127
    again = quantize(jnp.asarray(back))
    np.testing.assert_array_equal(again.values, stored.values)


def test_attention_over_int8_is_attention_over_what_it_stands_for():
    r = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(r.standard_normal(s), jnp.float32) for s in ((2, 4, 8), *((2, 2, 9, 8),) * 2)
    )
    rows = jnp.where(r.random((2, 2, 9)) < 0.7, 5, -1), jnp.full(2, 5)
    k8, v8 = quantize(k), quantize(v)
    ours, weights, _ = decode_attention(q, k8, v8, *rows, scale=0.3, softcap=2.0, weights=True)
    numbers = (dequantize(x, jnp.float32) for x in (k8, v8))
    theirs, expected, _ = decode_attention(q, *numbers, *rows, scale=0.3, softcap=2.0, weights=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(weights, expected, atol=2e-6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


def test_int8_halves_twice_and_stays_close(model, whole):
    plan = dataclasses.replace(PLANS[-1], storage="model")
    _, (exact,) = prefill(model, *pad_prompts(ROWS), plans=(plan,))
    small = whole[1][-1]
    assert small.kv_bytes == exact.kv_bytes // 32 * (8 + 4)  # H = 8 bytes and a scale, not 8 floats
    token, active = jnp.asarray([5, 6]), jnp.asarray([True, True])
    ours, _ = decode_step(model, small, token, active)
    theirs, _ = decode_step(model, exact, token, active)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert 0 < error < 0.02
