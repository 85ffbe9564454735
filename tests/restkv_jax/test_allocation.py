"""Budgets of heads: counts, flat storage, and decoding from it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.masked_eviction import select_flat
from restkv_jax.decode import (
    AdaKV,
    CachePlan,
    FrozenHeads,
    RestKV,
    SharedBudget,
    SnapKV,
    compress,
    decode_step,
    layer_inputs,
    pad_prompts,
    prefill,
    score,
)
from tests.restkv_jax import dense, tiny

compress = jax.jit(compress, static_argnums=0, static_argnames=("capacity", "heads"))
score = jax.jit(score, static_argnums=0, static_argnames="capacity")
W, SLOTS = 4, 12
FROZEN = FrozenHeads(slots=((5, 19), (14, 10)))
HEADS = [AdaKV(), AdaKV(floor=0.0, normalize=False), SharedBudget(), SharedBudget(floor=0), FROZEN]
LISTS = [AdaKV(lists=2), FrozenHeads(slots=((12, 12), (12, 12)), lists=2)]


def inputs(seed=0, batch=2, columns=60, lengths=(60, 31)):
    r = np.random.default_rng(seed)
    q, k, v = (r.standard_normal((batch, n, columns, 8)) for n in (4, 2, 2))
    k[:, 1] *= 3.0  # one head attends to few positions, the other to many
    w_o = r.standard_normal((4, 8, 24))
    arrays = [jnp.asarray(x, jnp.float32) for x in (2 * q, k, v, w_o)]
    return layer_inputs(*arrays, lengths=jnp.asarray(lengths, jnp.int32))


def by_head(kept, heads, row):
    owners, positions = np.asarray(kept.owners)[row, 0], np.asarray(kept.positions)[row, 0]
    return [positions[owners == head].tolist() for head in range(heads)]


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize("heads", HEADS[:4], ids=repr)
def test_each_head_keeps_its_best_and_together_they_fill_what_there_is(heads, granularity):
    layer, policy = inputs(), RestKV(window=W, granularity=granularity)
    sets = policy.cache_heads(4, 2)
    kept = compress(policy, layer, capacity=SLOTS, heads=heads)
    importance = np.asarray(score(policy, layer, capacity=SLOTS))
    assert kept.k.shape == (2, 1, sets * SLOTS, 8)
    for row, length in enumerate((60, 31)):
        found = by_head(kept, sets, row)
        total = sum(map(len, found))
        # AdaKV rounds each head's share twice, which may leave a slot or two of it empty.
        assert sets * (SLOTS - 1.5) <= total <= sets * SLOTS
        assert total == sets * SLOTS or isinstance(heads, AdaKV)
        for head, positions in enumerate(found):
            valid = importance[row, head, 60 - length :]
            best = np.sort(np.argsort(-valid, kind="stable")[: len(positions)])
            assert positions == best.tolist()
            assert set(range(length - W, length)) <= set(positions)
            floor = int(getattr(heads, "floor", 0) * (SLOTS - W))
            assert len(positions) >= W + floor - isinstance(heads, AdaKV)
    if isinstance(heads, SharedBudget) and heads.floor == 0:
        past = np.sort(importance[0][np.isfinite(importance[0])])[::-1]
        cut = past[sets * (SLOTS - W) - 1]
        expected = [int((np.isfinite(x) & (x >= cut)).sum()) + W for x in importance[0]]
        assert [len(positions) for positions in by_head(kept, sets, 0)] == expected
        assert len(set(expected)) > 1


def test_entries_are_the_prompts_own():
    layer, policy = inputs(), SnapKV(window=W, granularity="query_head")
    kept = compress(policy, layer, capacity=SLOTS, heads=AdaKV())
    for row, length in enumerate((60, 31)):
        owners, places = np.asarray(kept.owners)[row, 0], np.asarray(kept.positions)[row, 0]
        for slot in np.flatnonzero(owners >= 0):
            column = 60 - length + places[slot]
            source = (row, owners[slot] // 2, column)
            np.testing.assert_array_equal(kept.k[row, 0, slot], layer.k[source])
            np.testing.assert_array_equal(kept.v[row, 0, slot], layer.v[source])
        empty = owners < 0
        assert (places[empty] == -1).all()
        assert not np.asarray(kept.k)[row, 0, empty].any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-np.inf, 0.0, -0.0, 1.0, np.inf]), min_size=6, max_size=6),
        min_size=2,
        max_size=2,
    ),
    counts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_select_flat_is_each_heads_top_in_order(rows, counts):
    importance = np.array([rows], np.float32)
    capacity = max(sum(counts), 1)
    owners, columns = select_flat(
        jnp.asarray(importance), jnp.asarray([counts], jnp.int32), capacity=capacity
    )
    expected = []
    for head, count in enumerate(counts):
        best = np.argsort(-importance[0, head], kind="stable")[:count]
        expected += [(head, c) for c in sorted(best) if importance[0, head, c] > -np.inf]
    pairs = list(zip(owners[0, 0].tolist(), columns[0, 0].tolist(), strict=True))
    assert pairs == expected + [(-1, -1)] * (capacity - len(expected))


@pytest.mark.parametrize("heads", HEADS[1:4:2], ids=repr)
def test_heads_that_tie_at_zero_of_either_sign_win_in_order(heads):
    importance = jnp.asarray([[[-0.0, -1.0, -0.0], [0.0, -1.0, 0.0]]])
    counts = heads.counts(importance, jnp.asarray([1]), 3, 0)
    np.testing.assert_array_equal(counts, [[2, 0]])


@pytest.mark.parametrize("heads", [SharedBudget(lists=2), AdaKV(lists=2, floor=0.0)], ids=repr)
def test_lists_are_layers_of_their_heads_alone(heads):
    """Two lists of two heads each keep what two layers of those heads keep in one list each."""
    layer, policy = inputs(), SnapKV(window=W, granularity="query_head")
    kept = compress(policy, layer, capacity=SLOTS, heads=heads)
    for j in range(2):
        own = slice(2 * j, 2 * j + 2)
        half = layer_inputs(
            layer.q[:, own], layer.k[:, [j]], layer.v[:, [j]], layer.w_o[own], lengths=layer.lengths
        )
        alone = dataclasses.replace(heads, lists=1)
        expected = compress(policy, half, capacity=SLOTS, heads=alone)
        for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours[:, j], theirs[:, 0])


def test_lists_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(ValueError, match="lists: expected at least 1, got 0"):
        AdaKV(lists=0)
    with pytest.raises(ValueError, match="lists: 2 heads cannot be dealt out evenly to 3 lists"):
        compress(SnapKV(window=W), inputs(), capacity=SLOTS, heads=SharedBudget(lists=3))
    frozen = FrozenHeads(slots=((5, 19, 4, 4),), lists=2)
    with pytest.raises(ValueError, match="slots: expected 2 heads in layer 0, got budgets"):
        compress(SnapKV(window=W), inputs(), capacity=SLOTS, heads=frozen)


@pytest.mark.parametrize("heads", HEADS + LISTS, ids=repr)
def test_decoding_from_a_flat_cache_sees_what_each_head_kept(heads):
    model = tiny.make(layers=2)
    prompts = [np.random.default_rng(i).integers(0, 61, n).tolist() for i, n in enumerate((50, 33))]
    new = [5, 17, 41]
    plan = CachePlan(policy=RestKV(window=W), budget=SLOTS, heads=heads, headroom=4)
    _, (cache,) = prefill(model, *pad_prompts(prompts), plans=(plan,))
    # The bytes are the sum of the heads' budgets and the room for new tokens, no more.
    assert cache.kv_bytes == 2 * 2 * 2 * (2 * SLOTS + 2 * 4) * 8 * 4  # K/V layers rows slots H f32
    sets = [[by_head_of(cache, layer, row) for layer in range(2)] for row in range(len(prompts))]
    logits = []
    for token in new:
        out, cache = decode_step(model, cache, jnp.asarray([token] * 2), jnp.asarray([True, True]))
        logits.append(out)
    for row, prompt in enumerate(prompts):
        length = len(prompt) + len(new)
        allowed = []
        for layer in range(2):
            mask = np.tril(np.ones((4, length, length), bool))
            for head in range(4):
                evicted = np.setdiff1d(np.arange(len(prompt)), sets[row][layer][head // 2])
                mask[head, len(prompt) :, evicted] = False
            allowed.append(jnp.asarray(mask)[None])
        expected = dense.logits_of(model, prompt + new, allowed)[len(prompt) :]
        np.testing.assert_allclose(np.stack([x[row] for x in logits]), expected, atol=2e-5)


def by_head_of(cache, layer, row):
    owners = np.asarray(cache.owners(layer))[row]
    positions = np.asarray(cache.kept_positions(layer))[row]
    return [positions[owners == head].tolist() for head in range(2)]


def test_frozen_budgets_are_held_by_every_layer_and_head():
    model = tiny.make(layers=2)
    prompt = list(range(50))
    plan = CachePlan(policy=SnapKV(window=W), budget=SLOTS, heads=FROZEN, headroom=4)
    _, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan,))
    for layer, slots in enumerate(FROZEN.slots):
        assert [len(held) for held in by_head_of(cache, layer, 0)] == list(slots)
    uneven = FrozenHeads(slots=((5, 6), (14, 30)))
    plan = CachePlan(policy=SnapKV(window=W), budget=SLOTS, heads=uneven, headroom=4)
    _, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan,))
    assert [cache.slots(layer) for layer in range(2)] == [11 + 8, 44 + 8]


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: AdaKV(floor=1.5), "floor"),
        (lambda: SharedBudget(floor=-0.1), "floor"),
        (lambda: FrozenHeads(slots=((4, 0),)), "slots"),
        (lambda: CachePlan(policy=SnapKV(), budget=64, heads=AdaKV(), decode_budget=64), "heads"),
        (lambda: CachePlan(policy=SnapKV(), budget=0.5, heads=FROZEN), "heads"),
    ],
)
def test_bad_options_name_the_culprit(make, culprit):
    with pytest.raises(ValueError, match=culprit):
        make()


@pytest.mark.parametrize("slots", [((5, 5),), ((5, 5, 5),) * 2])
def test_frozen_budgets_of_another_model_are_refused(slots):
    plan = CachePlan(policy=SnapKV(window=W), budget=SLOTS, heads=FrozenHeads(slots=slots))
    model = tiny.make(layers=2)
    with pytest.raises(ValueError, match=r"(heads|slots)"):
        jax.eval_shape(lambda: prefill(model, *pad_prompts([[1, 2, 3]]), plans=(plan,)))
