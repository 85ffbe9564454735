"""A small model, prompts and plans for eight devices, and what is read from their programs."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from restkv_jax.decode import (
    POLICIES,
    CachePlan,
    Full,
    LaCache,
    MeshRules,
    VNorm,
    decode_chunk,
    init_decode,
    layer_inputs,
    pad_prompts,
    row_keys,
    shard,
)
from tests.restkv_jax import tiny

W, BUDGET, COLUMNS, STEPS = 4, 12, 64, 12
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


def assert_placed(tree, rules):
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(rules.shardings(tree)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)


def random_layer(rng):
    """One layer's attention of 8 rows, 8 query heads and 4 key/value heads."""
    q = rng.normal(size=(ROWS, 8, COLUMNS, 8))
    k, v = rng.normal(size=(2, ROWS, 4, COLUMNS, 8))
    w_o = rng.normal(size=(8, 8, 24))
    lengths = rng.integers(20, COLUMNS + 1, ROWS)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v, w_o))
    return layer_inputs(*arrays, lengths=jnp.asarray(lengths), num_layers=2)
