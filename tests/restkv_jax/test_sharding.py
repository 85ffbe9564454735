"""Caches, eviction and decoding on eight devices, against one device."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    H2O,
    TOVA,
    CachePlan,
    MeshRules,
    RestKV,
    compress,
    extend,
    prefill,
    prefill_bounded,
    prefill_chunked,
)
from tests.restkv_jax.eight_devices import (
    ATOL,
    BUDGET,
    COLLECTIVE,
    COLUMNS,
    PLANS,
    ROWS,
    TOKENS,
    VALID,
    W,
    assert_placed,
    collectives,
    compiled,
    decode_program,
    decoded,
    network,
    on,
    random_layer,
)

MESHES = [(2, 4), (4, 2), (8, 1)]


@functools.cache
def of_every_policy(mesh):
    """One prefill: logits, kept positions by policy and layer, greedy tokens, collectives."""
    model = on(mesh, network())
    program = compiled(prefill, model, TOKENS, VALID, plans=tuple(PLANS.values()))
    logits, caches = program(model, TOKENS, VALID)
    kept = [[np.asarray(cache.kept_positions(i)) for i in range(2)] for cache in caches]
    if mesh is not None:
        assert_placed(caches, model.rules)
    decode, state = decode_program(model, logits, caches[0])
    states = (dataclasses.replace(state, cache=cache) for cache in caches)
    # A copy of each, as decoding consumes it and they share all but the cache.
    tokens = [decoded(model, decode, jax.tree.map(jnp.copy, own))[0] for own in states]
    return np.asarray(logits), kept, tokens, collectives(program)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_policy_gives_the_sets_and_tokens_of_one_device(mesh):
    logits, kept, tokens, _ = of_every_policy(mesh)
    expected_logits, expected_kept, expected_tokens, _ = of_every_policy(None)
    np.testing.assert_allclose(logits, expected_logits, atol=ATOL)
    for name, ours, theirs in zip(PLANS, kept, expected_kept, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for name, ours, theirs in zip(PLANS, tokens, expected_tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_selection_of_heads_needs_no_collective_and_tova_one_all_reduce():
    """The compiled unit of work of one layer: scores, selection and compaction."""
    inputs, rules = random_layer(np.random.default_rng(1)), MeshRules.over(data=2, model=4)
    inputs = jax.device_put(inputs, rules.shardings(inputs))

    def unit(policies):
        def keep(inputs):
            return tuple(compress(policy, inputs, capacity=BUDGET) for policy in policies)

        return compiled(jax.jit(functools.partial(rules.on_shards, keep)), inputs)

    local = [plan.policy for name, plan in PLANS.items() if name != "tova"]
    assert collectives(unit(local)) == {}
    tova = unit([TOVA()])
    assert collectives(tova) == {"all-reduce": 1}
    # Its size: a weight for each column of each of the device's rows.
    (line,) = [line for line in tova.as_text().splitlines() if re.search(COLLECTIVE, line)]
    assert f"f32[{ROWS // 2},1,{COLUMNS}]" in line


def test_eviction_adds_no_collective_to_the_prefill():
    """All policies in one program, against a prefill that keeps everything."""
    model = on((2, 4), network())
    own = collectives(compiled(prefill, model, TOKENS, VALID, plans=(PLANS["full"],)))
    assert own == {"all-reduce": 1}  # behind the output projection, in the loop over layers
    assert of_every_policy((2, 4))[3] == own + Counter({"all-reduce": 1})  # TOVA's


DECODING = {
    "restkv": CachePlan(
        policy=RestKV(window=W, carry_over=True, granularity="query_head"),
        budget=12,
        decode_budget=10,
        evict_every=5,
        storage="int8",
    ),
    "h2o": CachePlan(policy=H2O(window=W), budget=12, decode_budget=10, evict_every=5),
    "tova": CachePlan(policy=TOVA(), budget=12, decode_budget=10, evict_every=5),
}


def test_eviction_while_decoding():
    """Rows are full at different steps, so that devices evict at different times.

    A step is in place. Beside the model's all-reduce for each layer there is one: whether anything
    is full at all.
    """
    results = []
    for mesh in (None, (2, 4)):
        model, own = on(mesh, network()), {}
        program = compiled(prefill, model, TOKENS, VALID, plans=tuple(DECODING.values()))
        logits, caches = program(model, TOKENS, VALID)
        for name, cache in zip(DECODING, caches, strict=True):
            decode, state = decode_program(model, logits, cache, steps=24)
            keys = jax.tree.leaves(state.cache.stacks[0].k)[0]
            tokens, state = decoded(model, decode, state)
            own[name] = tokens, [np.asarray(state.cache.kept_positions(i)) for i in range(2)]
            if mesh is not None:
                assert collectives(decode) == {"all-reduce": 2 + (name == "tova")}
                assert keys.is_deleted()
                assert_placed(state.cache, model.rules)
        results.append(own)
    for name in DECODING:
        for ours, theirs in zip(*(jax.tree.leaves(own[name]) for own in results), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_rings_and_questions_on_a_mesh():
    """A model with sliding windows, int8, then several tokens at once."""
    plan = dataclasses.replace(PLANS["snapkv"], storage="int8")
    results = []
    for mesh in (None, (4, 2)):
        model = on(mesh, network(window=9))
        logits, (cache,) = compiled(prefill, model, TOKENS, VALID, plans=(plan,))(
            model, TOKENS, VALID
        )
        tokens, state = decoded(model, *decode_program(model, logits, cache))
        question = TOKENS[:, -5:], VALID[:, -5:]
        after, cache = compiled(extend, model, state.cache, *question)(
            model, state.cache, *question
        )
        if mesh is not None:
            assert_placed(cache, model.rules)
        levels = [np.asarray(x.values, int) for s in cache.stacks for x in (s.k, s.v)]
        kept = [cache.kept_positions(i) for i in range(2)]
        results.append((tokens, np.asarray(after), kept, levels))
    (tokens, after, kept, levels), (ours, sharded, ours_kept, ours_levels) = results
    np.testing.assert_array_equal(ours, tokens)
    # A number between two int8 levels may fall to either: rarely, and to no other level.
    steps = [np.abs(one - other) for one, other in zip(ours_levels, levels, strict=True)]
    assert max(step.max() for step in steps) <= 1
    assert sum(int(step.sum()) for step in steps) <= 3
    same = sum(step.sum((1, 2, 3)) for step in steps) == 0
    np.testing.assert_allclose(sharded[same], after[same], atol=ATOL)
    np.testing.assert_allclose(sharded[~same], after[~same], atol=2e-3)
    for theirs, own in zip(kept, ours_kept, strict=True):
        np.testing.assert_array_equal(own, theirs)


@pytest.mark.parametrize("function", [prefill_chunked, prefill_bounded])
def test_prompts_in_pieces_on_a_mesh(function):
    plan = PLANS["snapkv"]
    plans = {"plan": plan} if function is prefill_bounded else {"plans": (plan,)}
    results = []
    for mesh in (None, (2, 4)):
        model = on(mesh, network())
        program = compiled(function, model, TOKENS, VALID, piece=24, **plans)
        logits, cache = program(model, TOKENS, VALID)
        cache = cache[0] if isinstance(cache, tuple) else cache
        results.append((logits, [cache.kept_positions(i) for i in range(2)]))
    (logits, kept), (ours, ours_kept) = results
    np.testing.assert_allclose(ours, logits, atol=ATOL)
    for theirs, own in zip(kept, ours_kept, strict=True):
        np.testing.assert_array_equal(own, theirs)
