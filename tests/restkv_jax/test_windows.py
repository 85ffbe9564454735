"""Layers with a sliding window: ring buffers beside the evicted layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CachePlan,
    Full,
    RestKV,
    SnapKV,
    Streaming,
    decode_step,
    generate,
    init_cache,
    pad_prompts,
    prefill,
)
from tests.restkv_jax import dense, tiny

W = 7
STEP = jax.jit(decode_step)
MIXED = (W, None, W)
POLICIES = [
    Full(),
    Streaming(),
    SnapKV(window=4),
    RestKV.paper(window=4, granularity="query_head"),
]


def plan_of(policy, budget=12, headroom=32):
    return CachePlan(
        policy=policy, budget=budget if policy.needs_budget else None, headroom=headroom
    )


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny.with_windows(tiny.make(layers=3), MIXED)


@pytest.mark.parametrize("length", [1, W, W + 1, 40])
def test_generation_longer_than_the_window_equals_full_attention(model, length):
    prompt = prompt_of(length)
    out = generate(model, [prompt], plan=plan_of(Full()), max_new_tokens=4 * W, chunk=9)
    logits = dense.logits_of(model, prompt + out.rows()[0])
    assert out.rows() == [jnp.argmax(logits[length - 1 : -1], -1).tolist()]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_eviction_acts_on_global_layers_only(model, policy):
    """Window layers see their window, the others what was kept; past one turn of the ring."""
    prompt, new = prompt_of(40), prompt_of(2 * W + 3, seed=9)
    _, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan_of(policy),))
    length = len(prompt) + len(new)
    allowed = []
    for layer, spec in enumerate(model.layer_specs):
        mask = np.tril(np.ones((spec.num_heads, length, length), bool))
        kept = np.asarray(cache.kept_positions(layer))[0]
        if spec.window is None:
            for n in range(spec.num_heads):
                evicted = np.setdiff1d(np.arange(40), kept[n * kept.shape[0] // spec.num_heads])
                mask[n, len(prompt) :, evicted] = False
        else:
            assert kept.shape == (spec.num_kv_heads, W)
            np.testing.assert_array_equal(kept, np.tile(np.arange(40 - W, 40), (2, 1)))
        allowed.append(jnp.asarray(mask)[None])
    expected = dense.logits_of(model, prompt + new, allowed)
    for i, token in enumerate(new):
        logits, cache = STEP(model, cache, jnp.asarray([token]), jnp.asarray([True]))
        np.testing.assert_allclose(logits[0], expected[len(prompt) + i], atol=2e-5)
    for layer in (0, 2):
        held = np.sort(np.asarray(cache.kept_positions(layer))[0], axis=-1)
        np.testing.assert_array_equal(held, np.tile(np.arange(length - W, length), (2, 1)))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_ragged_rows_equal_the_rows_alone(model, policy):
    rows = [prompt_of(length, seed=length) for length in (31, 2, 64, W, 13)]
    plan = plan_of(policy)
    together = generate(model, rows, plan=plan, max_new_tokens=3 * W, chunk=5)
    for row, ours, logprobs in zip(rows, together.rows(), together.logprobs, strict=True):
        alone = generate(model, [row], plan=plan, max_new_tokens=3 * W, chunk=5)
        assert [ours] == alone.rows()
        np.testing.assert_allclose(logprobs, alone.logprobs[0], atol=2e-5)


def test_a_row_that_is_done_keeps_its_ring(model):
    prompts = pad_prompts([prompt_of(20), prompt_of(5)])
    _, (cache,) = prefill(model, *prompts, plans=(plan_of(Full()),))
    held = np.asarray(cache.kept_positions(0))
    for token in prompt_of(W):
        active = jnp.asarray([False, True])
        _, cache = STEP(model, cache, jnp.full(2, token), active)
    np.testing.assert_array_equal(cache.kept_positions(0)[0], held[0])
    np.testing.assert_array_equal(cache.next_position, [20, 5 + W])


def test_a_window_is_whole_where_any_number_of_tokens_may_follow():
    # With eviction while decoding, neither prompt nor headroom bounds what a window will see.
    model = tiny.with_windows(tiny.make(), (20, 20))
    plan = CachePlan(policy=SnapKV(window=4), budget=8, headroom=0, decode_budget=8)
    found = generate(model, [prompt_of(3)], plan=plan, max_new_tokens=40)
    full = CachePlan(policy=Full(), headroom=40)
    expected = generate(model, [prompt_of(3)], plan=full, max_new_tokens=40)
    assert found.rows() == expected.rows()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("window", "columns", "headroom", "slots"),
    [(7, 64, 16, 7), (70, 64, 16, 70), (100, 64, 16, 80), (80, 64, 16, 80), (7, 4, 2, 6)],
)
def test_slots_of_a_window(window, columns, headroom, slots):
    """The window, or all tokens that there can be; the budget has no say, nor the policy."""
    model = tiny.with_windows(tiny.make(), (window, None))
    for policy in POLICIES:
        plan = plan_of(policy, headroom=headroom)
        cache = jax.eval_shape(
            lambda plan=plan: init_cache(
                model.layer_specs, plan, batch=2, prompt_columns=columns, dtype=jnp.float32
            )
        )
        ring, other = cache.stacks
        assert (ring.ring, other.ring) == (True, False)
        assert ring.k.shape == (2, 2, slots, 8)
        assert other.sizes == (plan.prompt_slots(columns) + headroom,)
        assert cache.kv_bytes == 8 * (ring.k.size + other.k.size)


def test_windows_of_two_sizes_are_two_rings():
    model = tiny.with_windows(tiny.make(layers=4), (3, None, 9, 3))
    prompt = prompt_of(30)
    out = generate(model, [prompt], plan=plan_of(Full()), max_new_tokens=25, chunk=8)
    logits = dense.logits_of(model, prompt + out.rows()[0])
    assert out.rows() == [jnp.argmax(logits[len(prompt) - 1 : -1], -1).tolist()]
    assert [stack.sizes for stack in out.cache.stacks] == [(3, 9, 3), (64 + 32,)]
