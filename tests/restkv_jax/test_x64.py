"""With `jax_enable_x64`, as training stacks set it, everything is what it is without."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CAOTE,
    H2O,
    TOVA,
    Ablation,
    AdaKV,
    CachePlan,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    Knorm,
    LaCache,
    Random,
    RestKV,
    Sampling,
    SharedBudget,
    SnapKV,
    Streaming,
    VNorm,
    compress,
    decode_chunk,
    extend,
    init_decode,
    layer_inputs,
    pad_prompts,
    prefill,
    prefill_bounded,
    prefill_chunked,
    row_keys,
)
from tests.pallas_kernels.lowering import lowered
from tests.restkv_jax import tiny
from tests.restkv_jax.jaxprs import equations

W = 4
DRAWN = Sampling(temperature=1.0, top_k=20, top_p=0.9)


def plan(policy, *, evicts=True, **options) -> CachePlan:
    room = {"decode_budget": 12, "evict_every": 4} if evicts else {"headroom": 16}
    return CachePlan(policy=policy, budget=12, **room, **options)


RELEASED = plan(RestKV(window=W), storage="int8")
PAPER = plan(RestKV.paper(window=W))
SUMS = plan(H2O(window=W))
BY_HEAD = plan(RestKV(window=W), heads=AdaKV(), evicts=False)
PLANS = (
    RELEASED,
    SUMS,
    BY_HEAD,
    plan(SnapKV(window=W)),
    PAPER,
    plan(RestKV.robust(window=W, recent=W)),
    plan(RestKV(window=W, temporal="mean", project=False)),
    plan(TOVA()),
    plan(Streaming(sinks=2)),
    plan(Streaming(sinks=2), rope="slot"),
    plan(Ablation(window=W, indicator="attn-v")),
    plan(CAOTE(window=W)),
    plan(DropKV(window=W)),
    plan(ExpectedAttention(rows=8)),
    plan(KeyDiff()),
    plan(Knorm()),
    plan(LaCache(span=1)),
    plan(Random()),
    plan(RestKV.paper(window=W, temporal="last"), evicts=False),
    plan(CriticalKV(window=W), evicts=False),
    plan(H2O(window=W, released=True), evicts=False),
    plan(VNorm(sinks=1, recent=2), layers="pyramid", evicts=False),
    plan(SnapKV(window=W, aggregate="max"), heads=SharedBudget(), evicts=False),
    CachePlan(policy=RestKV(window=W), budget=0.5, layers="pyramid", headroom=16),
    CachePlan(policy=Full(), headroom=16),
)


def prompt_tokens_question(model, tokens, valid, *, plan):
    """A prompt, sampled tokens that make the cache evict, and what is asked then."""
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    stops, limit = jnp.asarray([3], jnp.int32), jnp.full(len(tokens), 9, jnp.int32)
    state = init_decode(logits, cache, row_keys(0, len(tokens)), limit, stops, sampling=DRAWN)
    state, *said = decode_chunk(model, state, stops, steps=6, sampling=DRAWN)
    return logits, cache, said, extend(model, state.cache, tokens[:, :3])


def in_pieces(model, tokens, valid, *, plan):
    chunked = prefill_chunked(model, tokens, valid, plans=(plan,), piece=16)
    return chunked, prefill_bounded(model, tokens, valid, plan=plan, piece=16)


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    return pad_prompts([r.integers(0, 61, length).tolist() for length in (30, 19)], columns=32)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def assert_the_same(run, *args):
    run = jax.jit(run)
    without = run(*args)
    with jax.enable_x64(True):
        beside = run(*args)
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(beside), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_same_sets_of_a_prompt(model, batch):
    assert_the_same(functools.partial(prefill, plans=PLANS[:10]), model, *batch)


@pytest.mark.parametrize("plan", [RELEASED, BY_HEAD], ids=repr)
def test_the_same_tokens_and_sets(model, batch, plan):
    assert_the_same(functools.partial(prompt_tokens_question, plan=plan), model, *batch)


def assert_nothing_is_widened(run, *args):
    with jax.enable_x64(True):
        traced = jax.make_jaxpr(run)(*args)
    assert not {aval.dtype for aval in traced.out_avals} & {np.dtype(x) for x in (np.int64, float)}
    # Numbers of the program's text may be float64 until they meet an array.
    arrays = [out.aval for equation in equations(traced.jaxpr) for out in equation.outvars]
    assert not [aval for aval in arrays if aval.ndim and aval.dtype == np.float64]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_nothing_is_widened(batch, plan):
    """No array is float64 on the way, and nothing that comes out has 64 bits."""
    model = tiny.make()
    if plan.rope == "true":
        model = tiny.with_windows(model, (5, None))
    assert_nothing_is_widened(functools.partial(prompt_tokens_question, plan=plan), model, *batch)


@pytest.mark.parametrize("plan", [RELEASED, SUMS], ids=repr)
def test_nothing_is_widened_in_pieces(model, batch, plan):
    assert_nothing_is_widened(functools.partial(in_pieces, plan=plan), model, *batch)


@pytest.mark.parametrize("policy", [Streaming(sinks=2), RestKV(window=W)], ids=repr)
def test_lengths_and_budgets_may_be_int64(policy):
    r = np.random.default_rng(0)
    shapes = (2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8), (4, 8, 24)
    arrays = [jnp.asarray(r.standard_normal(shape, np.float32)) for shape in shapes]

    def kept(lengths, budget):
        layer = layer_inputs(*arrays, lengths=lengths)
        return compress(policy, layer, capacity=12, budget=budget)

    assert_the_same(kept, np.array([40, 22]), np.array([9, 12]))


@pytest.mark.parametrize("plan", [RELEASED, PAPER, SUMS], ids=repr)
def test_a_model_of_float64_scores_in_float32(model, batch, plan):
    """Its K/V keep their type; what is carried from eviction to eviction is float32."""
    with jax.enable_x64(True):
        run = functools.partial(prompt_tokens_question, plan=plan)
        _, cache, *_ = jax.eval_shape(run, tiny.cast(model, jnp.float64), *batch)
    stack = cache.stacks[0]
    assert (stack.positions.dtype, stack.used.dtype) == (np.int32, np.int32)
    assert plan is RELEASED or stack.k.dtype == np.float64
    assert plan is not SUMS or stack.carried.dtype == np.float32


@pytest.mark.parametrize("kind", [tiny.TinyModel, tiny.ScannedModel])
def test_kernels_lower(batch, kind):
    """Mosaic has no 64-bit types, and traces some of a kernel once more when it lowers it."""
    model = tiny.cast(tiny.make(size=128, width=256), jnp.bfloat16)
    model = kind(model.params, model.layer_specs)
    run = functools.partial(prompt_tokens_question, plan=plan(RestKV(window=W)))
    with jax.enable_x64(True):
        program = lowered(run, model, *batch, kind="TPU v5e")
    for kernel in ("splash", "window_scores", "eviction_threshold", "decode_attention"):
        assert kernel in program
