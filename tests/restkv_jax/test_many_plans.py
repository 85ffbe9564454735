"""Many policies and budgets in one prefill: each plan's own caches, and nothing computed twice."""

from __future__ import annotations

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
    ExpectedAttention,
    LaCache,
    RestKV,
    SnapKV,
    Streaming,
    compress,
    layer_inputs,
    pad_prompts,
    prefill,
    score,
    select,
)
from tests.restkv_jax import tiny
from tests.restkv_jax.jaxprs import counts

W = 4
BUDGETS = (9, 10, 12, 20)
POLICIES = [
    Streaming(),
    H2O(window=W),
    H2O(window=W, released=True),
    TOVA(),
    SnapKV(window=W),
    LaCache(span=1),
    RestKV(window=W),
    RestKV.robust(window=W, recent=W),
    RestKV.paper(window=W, granularity="query_head"),
    CAOTE(window=W),
    CriticalKV(window=W),
    ExpectedAttention(rows=16),
    Ablation(window=W, indicator="attn-v"),
]


def plans_of(policy, budgets=BUDGETS):
    return tuple(CachePlan(policy=policy, budget=budget, headroom=4) for budget in budgets)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    return pad_prompts([r.integers(0, 61, length).tolist() for length in (60, 33)])


def test_what_a_plan_keeps_does_not_depend_on_the_other_plans():
    """What one layer's inputs remember from plan to plan is never another plan's."""
    r = np.random.default_rng(0)
    shapes = (2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8), (4, 8, 24)
    arrays = [r.standard_normal(shape).astype(np.float32) for shape in shapes]

    def inputs():
        return layer_inputs(*arrays, lengths=jnp.asarray([40, 22]), index=1, num_layers=2)

    plans = [(policy, budget, None) for policy in POLICIES for budget in (9, 20)]
    plans += [(SnapKV(window=W), budget, AdaKV()) for budget in (9, 20)]

    @jax.jit
    def kept_together_and_alone():
        shared = inputs()
        together = [compress(p, shared, capacity=n, heads=heads) for p, n, heads in plans]
        # The first budget's score is what the second one might wrongly be given.
        alone = [compress(p, inputs(), capacity=n, heads=heads) for p, n, heads in plans[1::2]]
        return together[1::2], alone

    for plan, ours, alone in zip(plans[1::2], *kept_together_and_alone(), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=repr(plan))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_no_budget_changes_is_computed_once(model, batch, policy):
    """As many products and loops over heads for four budgets as for one."""

    def traced(plans):
        jaxpr = jax.make_jaxpr(lambda *args: prefill(*args, plans=plans))(model, *batch)
        return counts(jaxpr.jaxpr)

    one, four = traced(plans_of(policy, BUDGETS[:1])), traced(plans_of(policy))
    assert one["dot_general"] > 0
    assert four["dot_general"] == one["dot_general"]
    assert four["exp"] == one["exp"]
    if not getattr(policy, "scores_by_budget", False):
        assert four["scan"] == one["scan"]
        assert four["while"] == one["while"]


def test_policies_share_the_attention_of_the_window(model, batch):
    """Two policies that score by the same window take its softmax once."""

    def exponentials(*policies):
        plans = tuple(plan for policy in policies for plan in plans_of(policy, (9,)))
        jaxpr = jax.make_jaxpr(lambda *args: prefill(*args, plans=plans))(model, *batch)
        return counts(jaxpr.jaxpr)["exp"]

    alone = exponentials(SnapKV(window=W))
    assert exponentials(SnapKV(window=W), RestKV(window=W), CAOTE(window=W)) == alone
    assert exponentials(SnapKV(window=W), SnapKV(window=W + 1)) > alone


BUDGETS_BY_ROW = jnp.asarray([[9, 9], [12, 12]])
TRACES = {
    "jit": lambda policy, layer: jax.jit(lambda: score(policy, layer, capacity=12))(),
    "loop": lambda policy, layer: jax.lax.map(lambda b: kept(policy, layer, b), BUDGETS_BY_ROW),
    "jit in jit": lambda policy, layer: jax.jit(
        lambda: (TRACES["jit"](policy, layer), TRACES["loop"](policy, layer))
    )(),
}


def kept(policy, layer, budget):
    return select(policy, layer, capacity=12, budget=budget)


@pytest.fixture(scope="module")
def arrays():
    r = np.random.default_rng(1)
    shapes = (2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8), (4, 8, 24)
    return [jnp.asarray(r.standard_normal(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize("policy", [SnapKV(window=W), TOVA()], ids=repr)
@pytest.mark.parametrize("trace", TRACES)
def test_what_a_trace_made_stays_in_it(arrays, policy, trace):
    """Inputs that several programs close over: none of them is given what another one made."""
    expected = kept(policy, layer_inputs(*arrays), None)
    layer = layer_inputs(*arrays)
    TRACES[trace](policy, layer)
    np.testing.assert_array_equal(kept(policy, layer, None), expected)
    np.testing.assert_array_equal(jax.jit(lambda: kept(policy, layer, None))(), expected)


def test_what_one_trace_made_is_made_once_in_it(arrays):
    """Also of inputs that come from outside, and that another program has used before."""
    layer = layer_inputs(*arrays)

    def exponentials(budgets):
        program = jax.make_jaxpr(lambda: [kept(SnapKV(window=W), layer, b) for b in budgets])()
        return counts(program.jaxpr)["exp"]

    one = exponentials(BUDGETS_BY_ROW[:1])
    assert one > 0
    assert exponentials(BUDGETS_BY_ROW) == one
