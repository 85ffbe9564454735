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
from jax.sharding import AxisType, PartitionSpec

from restkv_jax.decode import (
    H2O,
    POLICIES,
    TOVA,
    AdaKV,
    CachePlan,
    CriticalKV,
    FrozenHeads,
    Full,
    LaCache,
    MeshRules,
    RestKV,
    SharedBudget,
    VNorm,
    compress,
    decode_chunk,
    extend,
    init_cache,
    init_decode,
    layer_inputs,
    pad_prompts,
    prefill,
    prefill_bounded,
    prefill_chunked,
    row_keys,
    score,
    shard,
    with_output_factors,
)
from tests.restkv_jax import tiny

W, BUDGET, COLUMNS, STEPS = 4, 12, 64, 12
MESHES = [(2, 4), (4, 2), (8, 1)]
NO_STOP = jnp.asarray([-1])
# Sums of the same numbers in another order; logits are of size 1 to 10.
ATOL = 2e-5
COLLECTIVE = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def small(policy_class):
    """The policy with options that fit 12 slots and two layers."""
    if policy_class is LaCache:
        return LaCache(sinks=2, span=1)
    if policy_class is VNorm:
        return VNorm(sinks=2, recent=W)
    return policy_class(window=W) if hasattr(policy_class, "window") else policy_class()


def plan_of(policy):
    """All caches of one size, also the full one: then all of them decode in one program."""
    slots = COLUMNS if isinstance(policy, Full) else BUDGET
    budget = BUDGET if policy.needs_budget else None
    return CachePlan(policy=policy, budget=budget, headroom=COLUMNS + STEPS - slots)


PLANS = {name: plan_of(small(policy)) for name, policy in POLICIES.items()}


def prompts():
    """Tokens do not repeat: equal keys would be ties, which rounding decides."""
    r = np.random.default_rng(0)
    rows = [r.permutation(97)[:length].tolist() for length in (40, 33, 64, 50, 20, 64, 41, 7)]
    return pad_prompts(rows, columns=COLUMNS)


TOKENS, VALID = prompts()
ROWS = len(TOKENS)


def network(**spec):
    model = tiny.make(layers=2, heads=8, kv_heads=4, vocab=97, **spec)
    return tiny.ScannedModel(model.params, model.layer_specs)  # compiles one layer, not two


def on(mesh, model):
    """The model on a mesh of data x model devices, or as it is."""
    return model if mesh is None else shard(model, MeshRules.over(data=mesh[0], model=mesh[1]))


def collectives(compiled):
    return Counter(re.findall(COLLECTIVE, compiled.as_text()))


def compiled(function, *args, **static):
    """Not optimised: these programs take longer to compile than to run."""
    options = {"xla_backend_optimization_level": 0}
    return function.lower(*args, **static).compile(compiler_options=options)


def decode_program(model, logits, cache, steps=STEPS):
    """The compiled decode loop, and the state that it starts from."""
    limit = jnp.full(ROWS, steps)
    state = init_decode(logits, cache, row_keys(0, ROWS), limit, NO_STOP)
    return compiled(decode_chunk, model, state, NO_STOP, steps=steps - 1), state


def decoded(model, program, state):
    """Greedy tokens, and the state behind them."""
    first = np.asarray(state.token)[:, None]
    state, tokens, _ = program(model, state, NO_STOP)
    return np.concatenate([first, tokens], axis=1), state


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


def assert_placed(tree, rules):
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(rules.shardings(tree)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_policy_gives_the_sets_and_tokens_of_one_device(mesh):
    logits, kept, tokens, _ = of_every_policy(mesh)
    expected_logits, expected_kept, expected_tokens, _ = of_every_policy(None)
    np.testing.assert_allclose(logits, expected_logits, atol=ATOL)
    for name, ours, theirs in zip(PLANS, kept, expected_kept, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for name, ours, theirs in zip(PLANS, tokens, expected_tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def layer(rng):
    """One layer's attention of 8 rows, 8 query heads and 4 key/value heads."""
    q = rng.normal(size=(ROWS, 8, COLUMNS, 8))
    k, v = rng.normal(size=(2, ROWS, 4, COLUMNS, 8))
    w_o = rng.normal(size=(8, 8, 24))
    lengths = rng.integers(20, COLUMNS + 1, ROWS)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v, w_o))
    return layer_inputs(*arrays, lengths=jnp.asarray(lengths), num_layers=2)


def test_selection_of_heads_needs_no_collective_and_tova_one_all_reduce():
    """The compiled unit of work of one layer: scores, selection and compaction."""
    inputs, rules = layer(np.random.default_rng(1)), MeshRules.over(data=2, model=4)
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


SHARES = [AdaKV(), SharedBudget(), FrozenHeads(slots=((9, 12, 15, 12),) * 2)]


@pytest.mark.parametrize(("mesh", "lists"), [((8, 1), 1), ((4, 2), 2), ((2, 4), 4)], ids=str)
def test_budgets_by_head_on_a_mesh(mesh, lists):
    """Heads share lists, a device holds whole ones: the sets and tokens of one device, no talk."""
    plans = tuple(
        dataclasses.replace(
            PLANS["snapkv"], heads=dataclasses.replace(heads, lists=lists), headroom=STEPS
        )
        for heads in SHARES
    )
    results = []
    for where in (None, mesh):
        model = on(where, network())
        program = compiled(prefill, model, TOKENS, VALID, plans=plans)
        logits, caches = program(model, TOKENS, VALID)
        if where is not None:
            assert_placed(caches, model.rules)
            # Behind the output projection, if heads are split; none is the eviction's.
            assert collectives(program) == ({"all-reduce": 1} if mesh[1] > 1 else {})
        kept = [[(c.kept_positions(i), c.owners(i)) for i in range(2)] for c in caches]
        tokens, _ = decoded(model, *decode_program(model, logits, caches[1]))
        results.append((kept, tokens))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("heads", SHARES, ids=lambda heads: heads.name)
def test_a_list_that_several_devices_would_hold_is_refused(heads):
    heads = dataclasses.replace(heads, lists=2)
    plan = dataclasses.replace(PLANS["snapkv"], heads=heads)
    rules = MeshRules.over(data=2, model=4)
    refused = rf"heads: .* 4 devices of mesh axis 'model'.*{heads.name}.*such as lists=4"
    with pytest.raises(ValueError, match=refused):
        prefill(shard(network(), rules), TOKENS, VALID, plans=(plan,))
    inputs = layer(np.random.default_rng(2))
    with pytest.raises(ValueError, match=refused):
        rules.on_shards(
            lambda layer: compress(plan.policy, layer, capacity=BUDGET, heads=heads), inputs
        )


def test_scores_of_a_layer_on_shards():
    """Budgets by row go along; the result is split by rows and heads."""
    inputs, rules = layer(np.random.default_rng(3)), MeshRules.over(data=4, model=2)
    budget = jnp.arange(8, 16)

    def scores(inputs, budget):
        return score(CriticalKV(window=W), inputs, capacity=16, budget=budget)

    found = jax.jit(functools.partial(rules.on_shards, scores))(inputs, budget)
    expected = jax.jit(scores)(inputs, budget)
    assert found.sharding.is_equivalent_to(rules.sharding("batch", "kv_heads"), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_shard_map_of_the_callers_own():
    """Over rows, without the check that loops do not pass: what one device says."""
    model = network()
    policy = RestKV(window=W)
    plan = CachePlan(policy=policy, budget=BUDGET, decode_budget=BUDGET, evict_every=4)

    def run(model, tokens, valid):
        logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
        rows = len(tokens)
        state = init_decode(logits, cache, row_keys(0, rows), jnp.full(rows, 9), NO_STOP)
        return logits, decode_chunk(model, state, NO_STOP, steps=6)[1]

    mesh, by_row = jax.make_mesh((4,), ("rows",), (AxisType.Auto,)), PartitionSpec("rows")
    on_devices = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), by_row, by_row),
        out_specs=by_row,
        check_vma=False,
    )
    logits, tokens = jax.jit(run)(model, TOKENS, VALID)
    ours, said = jax.jit(on_devices)(model, TOKENS, VALID)
    assert len(said.sharding.device_set) == 4
    np.testing.assert_allclose(ours, logits, atol=ATOL)
    np.testing.assert_array_equal(said, tokens)


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
        DECODING["restkv"],
        batch=ROWS,
        prompt_columns=COLUMNS,
        dtype=jnp.float32,
    )
    placed = jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make)))()
    for stack in placed.stacks:
        batch, heads, *rest = stack.k.values.shape
        assert stack.k.values.addressable_shards[0].data.shape == (batch // 2, heads // 4, *rest)
        assert stack.used.addressable_shards[0].data.shape == (1, batch // 2)
