"""Budgets by head on eight devices, against one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from restkv_jax.decode import (
    AdaKV,
    FrozenHeads,
    MeshRules,
    SharedBudget,
    compress,
    prefill,
    shard,
)
from tests.restkv_jax.eight_devices import (
    BUDGET,
    PLANS,
    STEPS,
    TOKENS,
    VALID,
    assert_placed,
    collectives,
    compiled,
    decode_program,
    decoded,
    network,
    on,
    random_layer,
)

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
    inputs = random_layer(np.random.default_rng(2))
    with pytest.raises(ValueError, match=refused):
        rules.on_shards(
            lambda layer: compress(plan.policy, layer, capacity=BUDGET, heads=heads), inputs
        )
