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
# One of each architecture; lowering takes longer than tracing, and the others differ by size only.
LOWERED = [
    "llama-3.1-8b",
    "mistral-7b-v0.3",
    "qwen2.5-7b",
    "gemma-7b",
    "gemma-2-9b",
    "gemma-3-4b",
]
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
def test_prefill_and_decode_trace_at_128k(name):
    """With eviction, and with all of the cache, whose size is what the config says."""
    config, model = config_of(name), abstract_model(name)
    per_token = 2 * 2 * config.num_kv_heads * config.head_dim  # K and V in bfloat16
    for plan in (CachePlan(policy=RestKV(), budget=1024), CachePlan(policy=Full())):
        state = jax.eval_shape(functools.partial(start, plan=plan), model, *abstract_prompt())
        everything = TOKENS if plan.budget is None else plan.budget
        slots = [
            everything + plan.headroom if window is None else min(window, TOKENS + plan.headroom)
            for window in config.windows
        ]
        assert state.cache.kv_bytes == per_token * sum(slots)
        after, tokens, _ = jax.eval_shape(
            functools.partial(decode_chunk, steps=8), model, state, STOP
        )
        assert tokens.shape == (1, 8)
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", LOWERED)
def test_prefill_and_decode_lower_at_128k(name):
    model, plan = abstract_model(name), CachePlan(policy=RestKV(), budget=1024)
    prompt = abstract_prompt()
    assert "dot_general" in prefill.lower(model, *prompt, plans=(plan,)).as_text()
    state = jax.eval_shape(functools.partial(start, plan=plan), model, *prompt)
    assert "dot_general" in decode_chunk.lower(model, state, STOP, steps=8).as_text()
