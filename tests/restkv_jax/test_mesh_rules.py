"""What is split over devices and how: tables of axes, units of work, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from restkv_jax.decode import (
    GREEDY,
    AdaKV,
    CachePlan,
    CriticalKV,
    MeshRules,
    RestKV,
    Sampling,
    decode_chunk,
    extend,
    init_cache,
    init_decode,
    prefill,
    prefill_bounded,
    prefill_chunked,
    row_keys,
    score,
    score_tokens,
    shard,
    with_output_factors,
)
from tests.restkv_jax import tiny
from tests.restkv_jax.eight_devices import (
    ATOL,
    BUDGET,
    COLUMNS,
    NO_STOP,
    PLANS,
    ROWS,
    TOKENS,
    VALID,
    W,
    network,
    on,
    random_layer,
)

# Every policy, evicting while it decodes where it can.
DECODING = {
    name: dataclasses.replace(plan, decode_budget=BUDGET, evict_every=4)
    for name, plan in PLANS.items()
    if plan.policy.needs_budget
} | {
    "full": PLANS["full"],
    "adakv": dataclasses.replace(PLANS["restkv"], heads=AdaKV()),
    "int8": dataclasses.replace(PLANS["restkv"], storage="int8", decode_budget=BUDGET),
}


def test_scores_of_a_layer_on_shards():
    """Budgets by row go along; the result is split by rows and heads."""
    inputs, rules = random_layer(np.random.default_rng(3)), MeshRules.over(data=4, model=2)
    budget = jnp.arange(8, 16)

    def scores(inputs, budget):
        return score(CriticalKV(window=W), inputs, capacity=16, budget=budget)

    found = jax.jit(functools.partial(rules.on_shards, scores))(inputs, budget)
    expected = jax.jit(scores)(inputs, budget)
    assert found.sharding.is_equivalent_to(rules.sharding("batch", "kv_heads"), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def by_rows(run, devices):
    """`run(model, tokens, valid)` in a `jax.shard_map` as a caller writes it."""
    mesh = jax.make_mesh((devices,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rows = PartitionSpec("rows")
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    )


def answers(logits, cache, model, sampling=GREEDY):
    rows = len(logits)
    keys, limit = row_keys(0, rows), jnp.full(rows, 9)
    state = init_decode(logits, cache, keys, limit, NO_STOP, sampling=sampling)
    return decode_chunk(model, state, NO_STOP, steps=6, sampling=sampling)[1]


def test_a_shard_map_of_the_callers_own():
    """Over rows: what one device says."""
    model = network()

    def run(model, tokens, valid):
        logits, (cache,) = prefill(model, tokens, valid, plans=(DECODING["restkv"],))
        return logits, answers(logits, cache, model)

    logits, tokens = jax.jit(run)(model, TOKENS, VALID)
    ours, said = by_rows(run, 4)(model, TOKENS, VALID)
    assert len(said.sharding.device_set) == 4
    np.testing.assert_allclose(ours, logits, atol=ATOL)
    np.testing.assert_array_equal(said, tokens)


@pytest.mark.parametrize("name", DECODING)
def test_plans_pass_the_check_of_a_shard_map(name):
    """Prefills of all forms, more tokens, sampling, scoring; heads are large enough for kernels.

    These are traced with the check, though they do not run here.
    """
    plan = DECODING[name]
    sampling = Sampling(temperature=0.7, top_p=0.9)
    small = tiny.make(layers=2, heads=8, kv_heads=4, vocab=97, size=64)
    model = tiny.with_windows(small, (None, 9))

    def run(model, tokens, valid):
        logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
        logits, cache = extend(model, cache, tokens[:, :3])
        said = [answers(logits[:, -1], cache, model, sampling)]
        if plan.heads is None:
            logits, (cache,) = prefill_chunked(model, tokens, valid, plans=(plan,), piece=24)
            said += [answers(logits, cache, model)]
        if isinstance(plan.budget, int) and plan.heads is None:
            logits, cache = prefill_bounded(model, tokens, valid, plan=plan, piece=24)
            said += [score_tokens(model, logits, cache, tokens[:, :6])[0]]
        return said

    outputs = jax.eval_shape(by_rows(run, 8), model, TOKENS, VALID)
    assert {x.shape for x in outputs} == {(ROWS, 6)}


def test_fewer_heads_than_devices_or_rows_that_do_not_split_are_refused():
    model = network()
    with pytest.raises(ValueError, match="4 key/value heads cannot be split over 8 devices"):
        shard(model, MeshRules.over(data=1, model=8))
    with pytest.raises(ValueError, match="3 rows cannot be split over 2 devices of axis 'data'"):
        prefill(on((2, 4), model), TOKENS[:3], VALID[:3], plans=(PLANS["full"],))
    with pytest.raises(ValueError, match="not sharded yet"):
        with_output_factors(on((2, 4), model))


def test_tables_that_do_not_fit_the_mesh_are_refused():
    with pytest.raises(ValueError, match="4 x 4, but 8 devices"):
        MeshRules.over(data=4, model=4)
    mesh = MeshRules.over(data=2, model=4).mesh
    with pytest.raises(ValueError, match="'batch' is split over 'rows'"):
        MeshRules(mesh, (("batch", "rows"),))
    with pytest.raises(ValueError, match="on the same mesh axis"):
        MeshRules(mesh, (("batch", "data"), ("kv_heads", "model")))
    with pytest.raises(ValueError, match="on different mesh axes"):
        MeshRules(mesh, (("batch", "data"), ("kv_heads", "data"), ("query_heads", "data")))
    explicit = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
    with pytest.raises(ValueError, match="expected axes of type Auto"):
        MeshRules(explicit)


def test_a_cache_is_placed_from_its_shapes():
    """Before anything is allocated: memory by device follows from the table."""
    rules = MeshRules.over(data=2, model=4)
    make = functools.partial(
        init_cache,
        tiny.with_windows(network(), (None, 9)).layer_specs,
        CachePlan(
            policy=RestKV(window=W, carry_over=True, granularity="query_head"),
            budget=12,
            decode_budget=10,
            storage="int8",
        ),
        batch=ROWS,
        prompt_columns=COLUMNS,
        dtype=jnp.float32,
    )
    placed = jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make)))()
    for stack in placed.stacks:
        batch, heads, *rest = stack.k.values.shape
        assert stack.k.values.addressable_shards[0].data.shape == (batch // 2, heads // 4, *rest)
        assert stack.used.addressable_shards[0].data.shape == (1, batch // 2)
