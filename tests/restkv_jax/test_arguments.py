"""Bad input: an error that names the argument, what was expected and what came."""

from __future__ import annotations

import functools

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
    compress,
    decode_step,
    extend,
    generate,
    join_rows,
    layer_inputs,
    measure_fidelity,
    pad_prompts,
    prefill,
    prefill_bounded,
    prefill_chunked,
    score,
    score_tokens,
    select,
)
from tests.restkv_jax import tiny

PLAN = CachePlan(policy=Full(), headroom=8)


@pytest.fixture(scope="module")
def prefilled():
    """A model, the logits that follow a prompt, and the prompt's cache."""
    model = tiny.make()
    logits, (cache,) = prefill(model, *pad_prompts([[3, 1, 4, 1, 5]]), plans=(PLAN,))
    return model, logits, cache


def test_tokens_of_more_or_fewer_rows_than_the_cache_are_refused(prefilled):
    model, logits, cache = prefilled
    asked = jnp.ones((2, 3), jnp.int32)
    expected = r"^tokens: expected 1 row\(s\), .* got 2; .*join_rows\(\[cache\] \* n\)"
    with pytest.raises(ValueError, match=expected):
        extend(model, cache, asked)
    with pytest.raises(ValueError, match=expected):
        score_tokens(model, jnp.tile(logits, (2, 1)), cache, asked)
    with pytest.raises(ValueError, match=expected):
        decode_step(model, cache, asked[:, 0], jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"^tokens: expected 2 row\(s\), .* got 1"):
        extend(model, join_rows([cache] * 2), asked[:1])


@pytest.mark.parametrize(
    ("tokens", "valid", "culprit"),
    [
        (np.ones((1, 8), int), np.ones((1, 6), bool), "valid"),
        (np.ones((1, 8), int), np.ones(8, bool), "valid"),
        (np.ones((1, 8)), np.ones((1, 8), bool), "tokens"),
        (np.ones(8, int), np.ones(8, bool), "tokens"),
        (np.ones((1, 0), int), np.ones((1, 0), bool), "tokens"),
    ],
    ids=["short mask", "flat mask", "floats", "flat tokens", "none"],
)
def test_tokens_and_masks_that_do_not_fit_are_refused(prefilled, tokens, valid, culprit):
    model, logits, cache = prefilled
    bounded = CachePlan(policy=SnapKV(window=4), budget=12)
    for call in (
        lambda: prefill(model, tokens, valid, plans=(PLAN,)),
        lambda: prefill_bounded(model, tokens, valid, plan=bounded, piece=8),
        lambda: extend(model, cache, tokens, valid),
        lambda: score_tokens(model, logits, cache, tokens, valid),
    ):
        with pytest.raises(ValueError, match=rf"^{culprit}: expected"):
            call()


def planned(**options):
    return CachePlan(**{"policy": SnapKV(window=4), "budget": 12, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "restkv"}, r"policy: expected a policy such as RestKV\(\), got 'restkv'"),
        ({"policy": RestKV}, r"policy: expected a policy such as RestKV\(\), got <class"),
        ({"heads": "adakv"}, r"heads: expected an allocation .* got 'adakv'"),
        ({"headroom": 8.0}, r"headroom: expected a whole number of at least 0, got 8\.0"),
        ({"headroom": True}, "headroom: expected a whole number of at least 0, got True"),
        ({"budget": "12"}, "budget: expected slots .* or a ratio .* got '12'"),
        ({"budget": (12, None)}, "budget: expected slots .* got None"),
        ({"budget": np.int64(4)}, "budget: 4 slots do not hold"),
        ({"decode_budget": 9.5}, r"decode_budget: expected a whole number .* got 9\.5"),
        ({"decode_budget": 4}, "decode_budget: 4 slots do not hold"),
        ({"decode_budget": 9, "evict_every": 0}, "evict_every: expected .* at least 1, got 0"),
    ],
    ids=str,
)
def test_options_of_a_plan_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        planned(**options)


def test_integers_of_numpy_make_the_same_plan():
    n = np.int64
    assert planned(budget=n(12), headroom=n(8)) == planned(headroom=8)
    evicting = planned(budget=(n(12), 0.5), decode_budget=n(9), evict_every=n(3))
    assert evicting == planned(budget=(12, 0.5), decode_budget=9, evict_every=3)
    # Their repr, too: configurations are written down.
    assert repr(evicting) == repr(planned(budget=(12, 0.5), decode_budget=9, evict_every=3))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1.7, 2.9]], {}, r"prompts: prompt 0: expected a row of integers.* got \[1\.7, 2\.9\]"),
        ([[3], "four"], {}, "prompts: prompt 1: expected a row of integers.* got 'four'"),
        ([3, 1, 4], {}, "prompts: prompt 0: expected a row of integers.* got 3"),
        ([[3], [4, -5]], {}, r"prompts: expected token ids from 0 .* got -5"),
        ([[3, 2**31]], {}, r"prompts: expected token ids from 0 .* got 2147483648"),
        ([[3], [61, 4]], {}, "prompts: expected token ids below 61.* got 61"),
        (np.zeros((0, 4), int), {}, "prompts: expected at least one"),
        ([[3]], {"chunk": 0}, "chunk: expected a whole number of at least 1, got 0"),
        ([[3]], {"chunk": -1}, "chunk: expected a whole number of at least 1, got -1"),
        ([[3]], {"max_new_tokens": 4.0}, r"max_new_tokens: expected a whole number .* got 4\.0"),
        ([[3]], {"stop_tokens": 5}, "stop_tokens: expected a row of integers.* got 5"),
        ([[3]], {"stop_tokens": [5.0]}, r"stop_tokens: expected a row of integers.* got \[5\.0\]"),
        ([[3]], {"plan": Full()}, r"plans: expected a tuple of plans.* got \(Full\(\),\)"),
    ],
    ids=str,
)
def test_arguments_of_a_generation_are_named(prefilled, prompts, options, message):
    model, *_ = prefilled
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(model, prompts, **{"plan": PLAN, "max_new_tokens": 4, **options})


def test_prompts_may_be_arrays_and_stop_tokens_a_set(prefilled):
    model, *_ = prefilled
    rows = [[3, 1, 4, 60], [1, 5, 9, 0]]
    expected = generate(model, rows, plan=PLAN, max_new_tokens=8)
    for prompts in (np.array(rows), jnp.array(rows), [np.array(row) for row in rows]):
        got = generate(model, prompts, plan=PLAN, max_new_tokens=np.int64(8), chunk=np.int64(8))
        assert got.rows() == expected.rows()
    stop = expected.rows()[0][2]
    stopped = [
        generate(model, rows, plan=PLAN, max_new_tokens=8, stop_tokens=form([stop])).rows()
        for form in (list, set, np.array)
    ]
    assert stopped[0] == stopped[1] == stopped[2]
    assert stopped[0][0] == expected.rows()[0][: expected.rows()[0].index(stop) + 1]


def test_one_plan_in_place_of_several_is_named(prefilled):
    model, *_ = prefilled
    prompt = pad_prompts([[3, 1, 4]])
    for call in (
        lambda: prefill(model, *prompt, plans=PLAN),
        lambda: prefill_chunked(model, *prompt, plans=PLAN, piece=8),
        lambda: measure_fidelity(model, *prompt, np.ones((1, 2), int), plans=PLAN),
    ):
        with pytest.raises(
            ValueError, match=r"^plans: expected a tuple of plans, such as \(plan,\)"
        ):
            call()


@pytest.mark.parametrize("method", [score, select, compress])
@pytest.mark.parametrize("length", [5, 40])
def test_slots_that_do_not_hold_what_is_always_kept_are_refused(method, length):
    q, k = jnp.ones((1, 4, length, 8)), jnp.ones((1, 2, length, 8))
    layer = layer_inputs(q, k, k, jnp.ones((4, 8, 24)))
    for policy in (RestKV(window=8), RestKV(window=6, sinks=2), Streaming(sinks=8)):
        with pytest.raises(ValueError, match=r"^capacity: expected more than the 8 slots.* got 8"):
            method(policy, layer, capacity=8)
        jax.eval_shape(functools.partial(method, policy, layer, capacity=9))
