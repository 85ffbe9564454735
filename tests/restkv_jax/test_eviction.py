"""Eviction while decoding, against a NumPy simulation token by token."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CAOTE,
    H2O,
    TOVA,
    CachePlan,
    CriticalKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    LaCache,
    Random,
    RestKV,
    SnapKV,
    Streaming,
    decode_chunk,
    decode_step,
    generate,
    init_cache,
    init_decode,
    pad_prompts,
    prefill,
    row_keys,
    with_output_factors,
)
from tests.pallas_kernels.lowering import lowered
from tests.restkv_jax import dense, oracle, tiny
from tests.restkv_jax.jaxprs import counts

W, BUDGET, EVERY, PROMPT, STEPS = 4, 14, 5, 20, 33
NO_STOP = jnp.asarray([-1])


def plan_of(policy, **options):
    options = {"budget": BUDGET, "decode_budget": BUDGET, "evict_every": EVERY, **options}
    return CachePlan(policy=policy, **options)


def recorded(model, tokens):
    """q, k, v [T, heads, H] of the first layer, which depend on tokens and positions alone."""
    seen = []

    def attend(layer, q, k, v, w_o, state):
        seen.append([np.asarray(x[0], np.float64) for x in (q, k, v)])
        return jnp.zeros_like(q), state

    row = jnp.asarray(tokens)[None]
    model(row, jnp.arange(row.shape[1])[None], attend, None)
    return seen[0]


class Simulation:
    """What each query head holds of one layer, scored as the equations say."""

    def __init__(self, arrays, w_o, heads, scale):
        self.q, self.k, self.v = arrays
        self.w_o, self.scale = w_o, scale
        self.kept = [[] for _ in range(heads)]
        self.carried = [{} for _ in range(heads)]
        self.every_tokens_sum = [np.zeros(len(self.q)) for _ in range(heads)]

    def weights(self, head, query):
        """{position: weight} of one query over what its head holds up to it."""
        at = [p for p in self.kept[head] if p <= query]
        logits = (
            self.scale * self.k[at, head * self.k.shape[1] // len(self.kept)] @ self.q[query, head]
        )
        odds = np.exp(logits - logits.max())
        return dict(zip(at, odds / odds.sum(), strict=True))

    def rows(self, head, now, window):
        """[W, held] weights of the last W queries."""
        held = self.kept[head]
        found = [self.weights(head, t) for t in range(now - window, now)]
        return np.array([[row.get(p, 0.0) for p in held] for row in found])


def simulate(score, arrays, w_o, heads, scale, total, *, every=EVERY, window=W):
    """Kept positions by head after each step; `score(sim, head, now)` over what is held."""
    sim = Simulation(arrays, w_o, heads, scale)
    history = []
    for now in range(total + 1):
        if now == PROMPT or (now > PROMPT and len(sim.kept[0]) == BUDGET + every and now < total):
            scores = [score(sim, head, now) for head in range(heads)]
            for head in range(heads):
                held = np.array(sim.kept[head])
                sim.kept[head] = held[oracle.top(scores[head], BUDGET)].tolist()
        history.append([list(held) for held in sim.kept])
        if now == total:
            break
        for head in range(heads):
            sim.kept[head].append(now)
        for head in range(heads):
            for position, weight in sim.weights(head, now).items():
                sim.every_tokens_sum[head][position] += weight
    return history


def pinned(past, window=W):
    return np.concatenate([past, np.full(window, np.inf)])


def snapkv(sim, head, now):
    return pinned(oracle.average_pool(sim.rows(head, now, W).sum(0)[:-W], 5))


def h2o(sim, head, now):
    return pinned(sim.every_tokens_sum[head][sim.kept[head]][:-W])


def streaming(sim, head, now):
    held = np.array(sim.kept[head], float)
    return np.where(held < 2, np.inf, held)


def tova(sim, head, now):
    last = [sim.rows(h, now, 1)[0] for h in range(len(sim.kept))]
    return np.mean(last, axis=0)


def carrying(sim, head, now):
    """The moving average of each entry goes on from the last eviction's."""
    rows, held = sim.rows(head, now, W), sim.kept[head]
    averaged = rows[0].copy()
    for i, p in enumerate(held):
        if p in sim.carried[head]:
            averaged[i] = 0.3 * rows[0, i] + 0.7 * sim.carried[head][p]
    for row in rows[1:]:
        averaged = 0.3 * row + 0.7 * averaged
    sim.carried[head] = dict(zip(held[:-W], averaged[:-W], strict=True))
    past, v = averaged[:-W], sim.v[held, head][:-W]
    distance = np.linalg.norm((past @ v - v) @ sim.w_o[head], axis=-1)
    return pinned(past / (1 - past) * distance)


CASES = [
    (Streaming(sinks=2), streaming, EVERY),
    (SnapKV(window=W), snapkv, EVERY),
    (H2O(window=W), h2o, EVERY),
    (TOVA(), tova, 1),
    (RestKV(window=W, spatial="none", carry_over=True), carrying, EVERY),
]


@pytest.mark.parametrize(("policy", "score", "every"), CASES, ids=[p.name for p, *_ in CASES])
def test_kept_sets_are_those_of_the_simulation_at_every_step(policy, score, every):
    heads = 4
    model = tiny.make(layers=1, heads=heads, kv_heads=heads, peak=4.0)
    tokens = np.random.default_rng(3).integers(0, 61, PROMPT + STEPS).tolist()
    spec = model.layer_specs[0]
    w_o = np.asarray(model.params["o"][0], np.float64)
    expected = simulate(
        score, recorded(model, tokens), w_o, heads, spec.scale, len(tokens), every=every
    )
    _, (cache,) = prefill(
        model, *pad_prompts([tokens[:PROMPT]]), plans=(plan_of(policy, evict_every=every),)
    )
    step = jax.jit(decode_step)
    for now in range(PROMPT, len(tokens) + 1):
        kept = np.asarray(cache.kept_positions(0))[0]
        for head in range(heads):
            # An eviction waits until its room is needed.
            assert kept[head][kept[head] >= 0].tolist() == expected[now][head] or (
                len(expected[now][head]) == BUDGET and now > PROMPT
            ), (now, head)
        if now < len(tokens):
            _, cache = step(model, cache, jnp.asarray(tokens[now : now + 1]), jnp.asarray([True]))
    assert cache.slots(0) == BUDGET + every


EVERYONE = [
    Streaming(),
    SnapKV(window=W),
    RestKV(window=W),
    RestKV.paper(window=W, granularity="query_head"),
    RestKV(window=W, carry_over=True),
    H2O(window=W),
    TOVA(),
    CAOTE(window=W),
    CriticalKV(window=W),
    ExpectedAttention(rows=8),
    KeyDiff(),
    Random(),
    LaCache(sinks=1, span=1),
]


@pytest.fixture(scope="module")
def model():
    return tiny.make(layers=2)


@pytest.mark.parametrize("policy", EVERYONE, ids=repr)
def test_rows_evict_each_at_its_own_time_as_they_would_alone(model, policy):
    rows = [np.random.default_rng(i).integers(0, 61, n).tolist() for i, n in enumerate((41, 11))]
    plan = plan_of(policy, budget=18, decode_budget=16, evict_every=6)
    together = generate(model, rows, plan=plan, max_new_tokens=40, chunk=8)
    alone = [generate(model, [row], plan=plan, max_new_tokens=40, chunk=8) for row in rows]
    assert together.rows() == [one.rows()[0] for one in alone]
    for layer in range(2):
        held = np.asarray(together.cache.kept_positions(layer))
        assert held.shape[-1] == 18 + 6
        for row, one in enumerate(alone):
            theirs = np.asarray(one.cache.kept_positions(layer))[0]
            np.testing.assert_array_equal(np.sort(held[row], -1), np.sort(theirs, -1))
        for head in held.reshape(-1, held.shape[-1]):
            assert (np.diff(head[head >= 0]) > 0).all()  # in order of position


@pytest.fixture(scope="module")
def full(model):
    rows = [list(range(30)), list(range(9))]
    plan = CachePlan(policy=Full(), headroom=66)  # 64 + 66 slots, as in the test below
    return rows, generate(model, rows, plan=plan, max_new_tokens=40, chunk=8)


@pytest.mark.parametrize(
    "policy", [Streaming(), RestKV(window=W), H2O(window=W), TOVA()], ids=lambda p: p.name
)
def test_a_budget_larger_than_the_sequence_is_the_full_cache_to_the_bit(model, full, policy):
    rows, expected = full
    plan = plan_of(policy, budget=120, decode_budget=100, evict_every=10)
    ours = generate(model, rows, plan=plan, max_new_tokens=40, chunk=8)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.logprobs, expected.logprobs)


def test_decoding_sees_what_the_evicted_cache_holds(model):
    """Logits equal full attention under the mask of what was held at each step."""
    plan = plan_of(SnapKV(window=W))
    tokens = np.random.default_rng(0).integers(0, 61, PROMPT + STEPS).tolist()
    _, (cache,) = prefill(model, *pad_prompts([tokens[:PROMPT]]), plans=(plan,))
    total = len(tokens)
    allowed = [np.tril(np.ones((4, total, total), bool)) for _ in range(2)]
    step, logits = jax.jit(decode_step), []
    for now in range(PROMPT, total):
        out, cache = step(model, cache, jnp.asarray(tokens[now : now + 1]), jnp.asarray([True]))
        logits.append(out[0])
        for layer in range(2):
            kept = np.asarray(cache.kept_positions(layer))[0]
            for head in range(4):
                allowed[layer][head, now] = np.isin(np.arange(total), kept[head // 2])
    expected = dense.logits_of(model, tokens, [jnp.asarray(mask)[None] for mask in allowed])
    np.testing.assert_allclose(np.stack(logits), expected[PROMPT:], atol=3e-5)


def test_layers_that_are_alike_are_compiled_once():
    def sorts(layers, **options):
        model = tiny.make(layers=layers)
        cache = init_cache(
            model.layer_specs,
            plan_of(RestKV(window=W), **options),
            batch=1,
            prompt_columns=PROMPT,
            dtype=jnp.float32,
        )
        step = jax.make_jaxpr(decode_step)(model, cache, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
        return counts(step.jaxpr)["sort"]

    assert sorts(5) == sorts(2) > 0
    assert sorts(3, budget=(40, 50, 60)) == 3 * sorts(2)  # each layer of a size of its own


@pytest.mark.parametrize("policy", [RestKV(window=W), CriticalKV(window=W)], ids=lambda p: p.name)
def test_every_layer_is_evicted_by_its_own_factor(policy):
    model, rows = tiny.make(layers=3), [list(range(40)), list(range(7))]
    plan = plan_of(policy)
    bare, factored = (
        generate(each, rows, plan=plan, max_new_tokens=20, chunk=8)
        for each in (model, with_output_factors(model))
    )
    for layer in range(3):
        ours, theirs = (np.asarray(one.cache.kept_positions(layer)) for one in (bare, factored))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(bare.logprobs, factored.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "policy", [RestKV(window=W, carry_over=True), H2O(window=W), TOVA()], ids=lambda p: p.name
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("budget", [900, (900, 950)], ids=["alike", "by_layer"])
def test_eviction_inside_the_loop_copies_no_cache(model, policy, dtype, budget):
    model = tiny.cast(model, dtype)
    columns, batch = 1024, 2
    plan = plan_of(policy, budget=budget, decode_budget=800, evict_every=100)
    shape = jax.ShapeDtypeStruct

    def start(model, tokens, valid):
        logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
        return init_decode(logits, cache, row_keys(0, batch), jnp.full(batch, 8), NO_STOP)

    state = jax.eval_shape(
        start, model, shape((batch, columns), jnp.int32), shape((batch, columns), bool)
    )
    compiled = decode_chunk.lower(model, state, NO_STOP, steps=8).compile(tiny.OPTIMISED)
    (stack,) = state.cache.stacks
    big = [stack.k, *(x for x in (stack.queries, stack.carried) if x is not None)]
    shapes = [f"[{','.join(map(str, x.shape))}]" for x in big]
    copies = [
        line.strip()
        for line in compiled.as_text().splitlines()
        if re.search(r" copy\(|= bf16\S* convert\(", line)
        and any(shape in line for shape in shapes)
    ]
    assert copies == []


def test_evicting_multiplies_none_of_the_weights(model):
    """The model runs for its output projections alone, which this policy does not even need."""

    def products(plan):
        _, (cache,) = prefill(model, *pad_prompts([list(range(40))]), plans=(plan,))
        step = jax.jit(decode_step).lower(model, cache, jnp.zeros(1, int), jnp.ones(1, bool))
        return len(re.findall(r" dot\(| custom-call\(", step.compile(tiny.OPTIMISED).as_text()))

    evicting = plan_of(Streaming(), budget=20, decode_budget=20, evict_every=10)
    keeping = CachePlan(policy=Streaming(), budget=20, headroom=10)
    assert products(evicting) == products(keeping) > 0


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_a_full_cache_is_compacted_by_the_kernels_of_a_prompt(storage):
    """A threshold search and one move, of what is stored; nothing is sorted by importance."""
    model = tiny.make(layers=1, heads=2, kv_heads=1, size=64, width=64)
    plan = plan_of(SnapKV(window=W), budget=128, decode_budget=128, evict_every=64)
    plan = dataclasses.replace(plan, storage=storage)
    _, (cache,) = jax.eval_shape(
        functools.partial(prefill, plans=(plan,)), model, *pad_prompts([list(range(40))])
    )
    program = lowered(decode_step, model, cache, jnp.zeros(1, int), jnp.ones(1, bool))
    assert 'kernel_name = "eviction_threshold"' in program
    assert 'kernel_name = "eviction_move"' in program
    assert "top_k" not in program
    assert program.count("stablehlo.sort") == 1  # by position


def test_the_same_program_serves_however_long_it_runs(model):
    plan = plan_of(RestKV(window=W))
    generate(model, [list(range(40))], plan=plan, max_new_tokens=8, chunk=8)
    before = decode_chunk._cache_size()
    out = generate(model, [list(range(33))], plan=plan, max_new_tokens=200, chunk=8)
    assert decode_chunk._cache_size() == before
    assert out.cache.slots(0) == BUDGET + EVERY
    assert int(out.cache.next_position[0]) == 33 + 199


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: CachePlan(policy=Full(), decode_budget=32), "decode_budget"),
        (lambda: plan_of(SnapKV(window=W), decode_budget=W), "budget"),
        (lambda: plan_of(SnapKV(window=W), decode_budget=0.5), "decode_budget"),
        (lambda: plan_of(SnapKV(window=W), evict_every=0), "evict_every"),
        (lambda: plan_of(H2O(window=W, released=True)), "decode_budget"),
        (lambda: RestKV(form="before", carry_over=True), "carry_over"),
    ],
)
def test_bad_plans_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=culprit):
        make()


def test_sliding_window_layers_are_left_alone(model):
    sliding = tiny.with_windows(model, (8, None))
    plan = plan_of(SnapKV(window=W))
    out = generate(sliding, [list(range(30))], plan=plan, max_new_tokens=40, chunk=8)
    last = 30 + 39
    held = np.sort(np.asarray(out.cache.kept_positions(0))[0], -1)
    np.testing.assert_array_equal(held, np.tile(np.arange(last - 8, last), (2, 1)))
    assert out.cache.slots(1) == BUDGET + EVERY
