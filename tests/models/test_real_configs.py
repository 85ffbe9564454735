"""Published models at their true size, described but never allocated."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from real_configs import REAL

from models.config import ModelConfig
from models.registry import make_network
from models.weights import parameter_shapes
from restkv_jax.decode import (
    CachePlan,
    Full,
    RestKV,
    decode_chunk,
    init_decode,
    prefill,
    row_keys,
)

TOKENS = 131072
STOP = jnp.asarray([-1])


@functools.cache
def config_of(name):
    return ModelConfig.from_hf(REAL[name][0])


def abstract_model(name):
    config = config_of(name)
    return make_network(config, lambda _, shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16))


def abstract_prompt():
    shape = (1, TOKENS)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)


def start(model, tokens, valid, *, plan):
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    return init_decode(logits, cache, row_keys(0, 1), jnp.full(1, 8, jnp.int32), STOP)


@pytest.mark.parametrize("name", REAL)
def test_parameter_count(name):
    shapes = parameter_shapes(config_of(name))
    assert sum(math.prod(shape) for shape in shapes.values()) == REAL[name][1]


@pytest.mark.parametrize("name", REAL)
def test_prefill_and_decode_at_128k(name):
    """Both lower with eviction and trace with all of the cache, whose size follows from the plan.

    Nothing is allocated: weights, tokens and cache are shapes. One test, so that what is traced
    to know the shapes is not traced again to lower it.
    """
    config, model, prompt = config_of(name), abstract_model(name), abstract_prompt()
    per_token = 2 * 2 * config.num_kv_heads * config.head_dim  # K and V in bfloat16
    before = allocated()
    for plan in (CachePlan(policy=RestKV(), budget=1024), CachePlan(policy=Full())):
        if plan.budget is not None:
            lowered = prefill.lower(model, *prompt, plans=(plan,))
            assert_program(lowered, model)
        state = jax.eval_shape(functools.partial(start, plan=plan), model, *prompt)
        everything = TOKENS if plan.budget is None else plan.budget
        slots = [
            everything + plan.headroom if window is None else min(window, TOKENS + plan.headroom)
            for window in config.windows
        ]
        assert state.cache.kv_bytes == per_token * sum(slots)
        if plan.budget is not None:
            lowered = decode_chunk.lower(model, state, STOP, steps=8)
            assert_program(lowered, model)
            after, tokens, _ = lowered.out_info
        else:
            run = functools.partial(decode_chunk, steps=8)
            after, tokens, _ = jax.eval_shape(run, model, state, STOP)
        assert tokens.shape == (1, 8)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    assert allocated() - before < 2**20


def assert_program(lowered, model):
    """That it computes, and takes the weights as they are."""
    assert "stablehlo.dot_general" in lowered.as_text()
    (weights, *_), _ = lowered.in_avals
    taken, given = jax.tree.leaves(weights), jax.tree.leaves(model)
    assert [(leaf.shape, leaf.dtype) for leaf in taken] == [
        (leaf.shape, leaf.dtype) for leaf in given
    ]


def allocated():
    return sum(array.nbytes for array in jax.live_arrays())
