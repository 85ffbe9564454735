"""Many policies and budgets in one prefill: each plan's own caches, and nothing computed twice."""

from __future__ import annotations

import jax
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
    pad_prompts,
    prefill,
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
    RestKV.robust(window=W),
    RestKV.paper(window=W, granularity="query_head"),
    CAOTE(window=W),
    CriticalKV(window=W),
    ExpectedAttention(rows=16),
    Ablation(window=W, indicator="attn-v"),
]


def plans_of(policy, budgets=BUDGETS, **options):
    return tuple(CachePlan(policy=policy, budget=b, headroom=4, **options) for b in budgets)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    return pad_prompts([r.integers(0, 61, length).tolist() for length in (60, 33)])


def test_every_cache_is_the_one_of_its_plan_alone(model, batch):
    """All policies at two budgets, and budgets by head, against prefills of one plan each."""
    plans = sum((plans_of(policy, (9, 20)) for policy in POLICIES), ())
    plans += plans_of(SnapKV(window=W), (9, 12), heads=AdaKV())
    logits, caches = prefill(model, *batch, plans=plans)
    compared = list(zip(plans, caches, strict=True))
    # Each alone is a program of its own: of every policy the larger budget's.
    for plan, cache in compared[1::2]:
        alone_logits, (alone,) = prefill(model, *batch, plans=(plan,))
        np.testing.assert_array_equal(logits, alone_logits)
        for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=repr(plan))


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
