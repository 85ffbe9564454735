"""Prefill, eviction and decoding against full attention without a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    AdaKV,
    CachePlan,
    CriticalKV,
    Full,
    RestKV,
    Sampling,
    SnapKV,
    Streaming,
    decode_chunk,
    decode_step,
    extend,
    form_of,
    generate,
    init_decode,
    join_rows,
    pad_prompts,
    prefill,
    row_keys,
    score_tokens,
    with_output_factors,
)
from tests.restkv_jax import dense, tiny

W = 4
POLICIES = [
    Full(),
    Streaming(),
    SnapKV(window=W),
    RestKV(window=W),
    RestKV.paper(window=W, granularity="query_head"),
]
NO_STOP = jnp.asarray([-1])


def plan_of(policy, budget=12, headroom=16, **evicting):
    budget = budget if policy.needs_budget else None
    return CachePlan(policy=policy, budget=budget, headroom=headroom, **evicting)


def prompts(*lengths, seed=0):
    r = np.random.default_rng(seed)
    return [r.integers(0, 61, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.mark.parametrize("spec", [{}, {"softcap": 3.0}, {"window": 7}], ids=str)
def test_full_cache_decodes_as_no_cache_does(spec):
    model = tiny.make(layers=3, **spec)
    (prompt,) = prompts(40)
    out = generate(model, [prompt], plan=plan_of(Full()), max_new_tokens=12, chunk=4)
    logits = dense.logits_of(model, prompt + out.rows()[0])
    assert out.rows() == [jnp.argmax(logits[len(prompt) - 1 : -1], -1).tolist()]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_logits_of_the_prompt_do_not_depend_on_the_policy(model, policy):
    (prompt,) = prompts(70)
    logits, _ = prefill(model, *pad_prompts([prompt]), plans=(plan_of(policy),))
    np.testing.assert_allclose(logits[0], dense.logits_of(model, prompt)[-1], atol=2e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_decoding_sees_exactly_what_was_kept(model, policy):
    """Logits from the evicted cache equal full attention under the kept positions' mask."""
    (prompt,), new = prompts(50), prompts(6, seed=9)[0]
    _, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan_of(policy),))
    length = len(prompt) + len(new)
    allowed = []
    for layer, spec in enumerate(model.layer_specs):
        kept = np.asarray(cache.kept_positions(layer))[0]
        mask = np.tril(np.ones((spec.num_heads, length, length), bool))
        for n in range(spec.num_heads):
            evicted = np.setdiff1d(np.arange(50), kept[n * kept.shape[0] // spec.num_heads])
            mask[n, len(prompt) :, evicted] = False
        allowed.append(jnp.asarray(mask)[None])
    expected = dense.logits_of(model, prompt + new, allowed)
    for i, token in enumerate(new):
        logits, cache = decode_step(model, cache, jnp.asarray([token]), jnp.asarray([True]))
        np.testing.assert_allclose(logits[0], expected[len(prompt) + i], atol=2e-5)
    assert int(cache.next_position[0]) == length


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_ragged_rows_equal_the_rows_alone(model, policy, side):
    rows = prompts(31, 9, 64, 13)
    columns = 80
    tokens, valid = np.full((4, columns), 7, np.int32), np.zeros((4, columns), bool)
    for b, row in enumerate(rows):
        start = {"left": columns - len(row), "right": 0, "both": 5}[side]
        tokens[b, start : start + len(row)] = row
        valid[b, start : start + len(row)] = True
    plan = plan_of(policy)
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    kept = [np.asarray(cache.kept_positions(layer)) for layer in range(2)]
    state = init_decode(logits, cache, row_keys(0, 4), jnp.full(4, 9), NO_STOP)
    first = np.asarray(state.token)
    _, rest, _ = decode_chunk(model, state, NO_STOP, steps=8)
    for b, row in enumerate(rows):
        alone_logits, (alone,) = prefill(model, *pad_prompts([row]), plans=(plan,))
        np.testing.assert_allclose(logits[b], alone_logits[0], atol=2e-5)
        for layer in range(2):
            positions = np.asarray(alone.kept_positions(layer))[0]
            for ours, theirs in zip(kept[layer][b], positions, strict=True):
                np.testing.assert_array_equal(ours[ours >= 0], theirs[theirs >= 0])
        out = generate(model, [row], plan=plan, max_new_tokens=9, chunk=8)
        assert out.rows() == [[int(first[b]), *rest[b].tolist()]]


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_prompts_within_the_budget_lose_nothing(model, policy):
    rows = prompts(10, 12, 5)
    full = generate(model, rows, plan=plan_of(Full()), max_new_tokens=10, chunk=3)
    ours = generate(model, rows, plan=plan_of(policy), max_new_tokens=10, chunk=3)
    assert ours.rows() == full.rows()
    np.testing.assert_allclose(ours.logprobs, full.logprobs, atol=1e-5)


def test_one_prefill_serves_many_plans(model):
    batch = pad_prompts(prompts(40, 22))
    plans = tuple(plan_of(policy, budget) for policy in POLICIES[2:] for budget in (8, 12))
    logits, caches = prefill(model, *batch, plans=plans)
    for plan, cache in zip(plans, caches, strict=True):
        alone_logits, (alone,) = prefill(model, *batch, plans=(plan,))
        np.testing.assert_allclose(logits, alone_logits, atol=1e-6)
        for layer in range(2):
            np.testing.assert_array_equal(cache.kept_positions(layer), alone.kept_positions(layer))


def test_factors_made_before_change_nothing(model):
    batch = pad_prompts(prompts(40, 22))
    plans = tuple(plan_of(policy) for policy in (*POLICIES, CriticalKV(window=W)))
    logits, caches = prefill(model, *batch, plans=plans)
    factored_logits, factored = prefill(with_output_factors(model), *batch, plans=plans)
    np.testing.assert_array_equal(logits, factored_logits)
    for one, other in zip(caches, factored, strict=True):
        for layer in range(2):
            np.testing.assert_array_equal(one.kept_positions(layer), other.kept_positions(layer))


def test_slots_depend_on_budget_and_headroom_only(model):
    plan = plan_of(RestKV(window=W))
    shapes = {
        jax.eval_shape(
            lambda *a: prefill(*a, plans=(plan,)),
            model,
            jax.ShapeDtypeStruct((2, columns), jnp.int32),
            jax.ShapeDtypeStruct((2, columns), bool),
        )[1][0]
        .stacks[0]
        .k.shape
        for columns in (8, 64, 4096)
    }
    assert shapes == {(2, 2, 2 * (12 + 16), 8)}


def test_a_chunk_is_its_steps(model):
    (prompt,) = prompts(40)
    plan = plan_of(RestKV(window=W))
    logits, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan,))
    copy = jax.tree.map(jnp.copy, cache)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    stepped = [int(token[0])]
    for _ in range(8):
        step_logits, copy = decode_step(model, copy, token, jnp.asarray([True]))
        token = jnp.argmax(step_logits, -1).astype(jnp.int32)
        stepped.append(int(token[0]))
    state = init_decode(logits, cache, row_keys(0, 1), jnp.asarray([16]), NO_STOP)
    state, tokens, _ = decode_chunk(model, state, NO_STOP, steps=8)
    assert tokens[0].tolist() == stepped[1:]
    for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(copy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_state_is_donated(model):
    logits, (cache,) = prefill(model, *pad_prompts(prompts(40)), plans=(plan_of(RestKV(window=W)),))
    state = init_decode(logits, cache, row_keys(0, 1), jnp.asarray([9]), NO_STOP)
    decode_chunk(model, state, NO_STOP, steps=4)
    assert state.cache.stacks[0].k.is_deleted()


@pytest.mark.parametrize("windows", [(None,) * 4, (1024, None, 1024, None)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", [Full(), RestKV(window=W, granularity="query_head")], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_the_decode_loop_copies_no_cache(dtype, policy, batch, windows):
    """The optimised program holds no copy of a cache-sized array, in or out of the loop.

    In bfloat16 it holds the caches as bits, too, into and out of which a chunk turns them once.
    """
    model = tiny.with_windows(tiny.cast(tiny.make(layers=4), dtype), windows)
    columns = 4096
    plan = plan_of(policy, budget=3000)
    state = _state_shape(model, plan, batch, columns)
    compiled = decode_chunk.lower(model, state, NO_STOP, steps=8).compile(tiny.OPTIMISED)
    assert len(state.cache.stacks) == len(set(windows))
    wholes = {_listed(stack.k.shape) for stack in state.cache.stacks}
    layers = {
        _listed((*stack.k.shape[:2], stack.sizes[0], stack.k.shape[3]))
        for stack in state.cache.stacks
    }
    copies = [
        line.strip()
        for line in compiled.as_text().splitlines()
        if (" copy(" in line and any(shape in line for shape in wholes | layers))
        or any(f"= bf16{shape}" in line and " convert(" in line for shape in wholes)
    ]
    assert copies == []
    # One layer's slice feeds its products; never the cache of all four.
    one_layer = max(2 * 4 * stack.k.size // len(stack.sizes) for stack in state.cache.stacks)
    as_bits = sum(4 * stack.k.size for stack in state.cache.stacks) * (dtype == jnp.bfloat16)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * one_layer + as_bits


def _listed(shape):
    return f"[{','.join(map(str, shape))}]"


def _state_shape(model, plan, batch, columns):
    def start(model, tokens, valid):
        logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
        return init_decode(logits, cache, row_keys(0, batch), jnp.full(batch, 8), NO_STOP)

    shape = jax.ShapeDtypeStruct
    return jax.eval_shape(
        start, model, shape((batch, columns), jnp.int32), shape((batch, columns), bool)
    )


def test_prefill_holds_one_layers_keys_and_values_at_a_time():
    """Working memory does not grow with the number of layers, when they are evicted."""
    columns, batch = 2048, 1
    plan = plan_of(SnapKV(window=W), budget=16)

    def temporary(layers):
        model = tiny.make(layers=layers, size=32)
        shape = jax.ShapeDtypeStruct
        lowered = prefill.lower(
            model,
            shape((batch, columns), jnp.int32),
            shape((batch, columns), bool),
            plans=(plan,),
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_layer = 2 * 4 * columns * 2 * 32  # K and V, float32, two heads of 32
    assert temporary(8) - temporary(2) < 0.5 * one_layer


def test_nothing_recompiles_when_lengths_seeds_or_weights_change(model):
    plan = plan_of(RestKV(window=W))
    sampling = Sampling(temperature=0.7)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1.1, model.params))

    def run(model, row, seed):
        return generate(
            model, [row], plan=plan, max_new_tokens=9, sampling=sampling, seed=seed, chunk=4
        )

    run(model, prompts(40)[0], 0)
    sizes = prefill._cache_size(), decode_chunk._cache_size(), init_decode._cache_size()
    run(model, prompts(33)[0], 1)
    run(model, prompts(64)[0], 2)
    run(other, prompts(50)[0], 3)
    assert sizes == (
        prefill._cache_size(),
        decode_chunk._cache_size(),
        init_decode._cache_size(),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "evicting", [{}, {"decode_budget": 12, "evict_every": 4, "headroom": 0}], ids=str
)
def test_a_model_may_scan_over_its_layers(model, dtype, evicting):
    """`attend` takes a traced layer index where all layers have one shape."""
    model = tiny.cast(model, dtype)
    plan = plan_of(RestKV(window=W), **evicting)
    rows = prompts(40, 17)
    scanned = tiny.ScannedModel(model.params, model.layer_specs)
    ours = generate(scanned, rows, plan=plan, max_new_tokens=8, chunk=4)
    expected = generate(model, rows, plan=plan, max_new_tokens=8, chunk=4)
    assert ours.rows() == expected.rows()


def test_bfloat16_cache_holds_bfloat16(model):
    half = tiny.cast(model, jnp.bfloat16)
    logits, (cache,) = prefill(half, *pad_prompts(prompts(40)), plans=(plan_of(RestKV(window=W)),))
    assert cache.stacks[0].k.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    reference, _ = prefill(model, *pad_prompts(prompts(40)), plans=(plan_of(RestKV(window=W)),))
    assert float(jnp.abs(logits - reference).max()) < 0.05 * float(jnp.abs(reference).max())


def test_cache_bytes_are_those_of_the_arrays(model):
    _, (kv, query) = prefill(
        model,
        *pad_prompts(prompts(40)),
        plans=(
            plan_of(RestKV(window=W)),
            plan_of(RestKV(window=W, granularity="query_head")),
        ),
    )
    assert kv.kv_bytes == 2 * 2 * 2 * (12 + 16) * 8 * 4  # K and V, layers, heads, slots, H, f32
    assert query.kv_bytes == 2 * kv.kv_bytes
    assert kv.total_bytes == kv.kv_bytes + 2 * 2 * 28 * 4 + 2 * 4 + 4


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_rows_of_joined_caches_go_on_as_they_would_alone(model, storage):
    tokens, valid = pad_prompts([[5 + i * i % 30 for i in range(40)], [7, 8, 9] * 8])
    plans = tuple(
        CachePlan(policy=policy, budget=16, headroom=8, storage=storage)
        for policy in (SnapKV(window=4), Streaming())
    )
    _, caches = prefill(model, tokens, valid, plans=plans)
    ahead = jnp.asarray([[11, 12, 13]] * 2), jnp.ones((2, 3), bool)
    alone = [extend(model, cache, *ahead) for cache in caches]
    joined = join_rows(caches)
    assert form_of(joined) == form_of(caches[0])
    out, cache = extend(model, joined, *(jnp.tile(x, (2, 1)) for x in ahead))
    np.testing.assert_allclose(out, jnp.concatenate([found for found, _ in alone]), atol=1e-5)
    for layer in range(len(cache.rows)):
        expected = jnp.concatenate([own.kept_positions(layer) for _, own in alone])
        np.testing.assert_array_equal(cache.kept_positions(layer), expected)


def test_caches_of_other_forms_are_not_joined(model):
    tokens, valid = pad_prompts([[5 + i for i in range(40)]])
    plans = tuple(CachePlan(policy=Streaming(), budget=b, headroom=8) for b in (16, 24))
    _, caches = prefill(model, tokens, valid, plans=plans)
    with pytest.raises(ValueError, match="caches: expected caches of one form, number 1 differs"):
        join_rows(caches)
    with pytest.raises(ValueError, match="caches: expected at least one"):
        join_rows([])


COPIED = (
    CachePlan(policy=Full(), headroom=8),
    CachePlan(policy=RestKV(window=W), budget=16, headroom=8, storage="int8"),
    CachePlan(policy=SnapKV(window=W), budget=16, headroom=8, heads=AdaKV()),
    CachePlan(policy=SnapKV(window=W), budget=16, decode_budget=12, evict_every=6),
)


@pytest.fixture(scope="module")
def one_row():
    """A model with a sliding window in one layer, logits of a prompt, and a cache by plan."""
    model = tiny.with_windows(tiny.make(), (6, None))
    return model, *prefill(model, *pad_prompts(prompts(40)), plans=COPIED)


@pytest.mark.parametrize("which", range(len(COPIED)), ids=["full", "int8", "adakv", "evicting"])
def test_copies_of_a_cache_answer_each_question_as_it_alone_does(one_row, which):
    model, logits, caches = one_row
    cache, questions = caches[which], jnp.asarray(prompts(5, 5, 5, seed=3))
    copies = join_rows([cache] * 3)
    out, after = extend(model, copies, questions)
    scores, _ = score_tokens(model, jnp.tile(logits, (3, 1)), copies, questions)
    for b in range(3):
        alone, own = extend(model, cache, questions[b : b + 1])
        np.testing.assert_allclose(out[b], alone[0], atol=2e-5)
        expected, _ = score_tokens(model, logits, cache, questions[b : b + 1])
        np.testing.assert_allclose(scores[b], expected[0], atol=2e-5)
        for layer in range(2):
            np.testing.assert_array_equal(
                after.kept_positions(layer)[b], own.kept_positions(layer)[0]
            )
