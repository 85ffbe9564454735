"""Whole programs to compile for devices that are not here; of shapes alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from experiments.efficiency.subject import RANDOM
from models import Llama, ModelConfig
from models.matmul import matmul
from pallas_kernels.quantized import QuantArray
from restkv_jax.cache import init_cache
from restkv_jax.decode import (
    CachePlan,
    Full,
    RestKV,
    decode_chunk,
    init_decode,
    prefill,
    row_keys,
    with_output_factors,
)
from tests.pallas_kernels.lowering import compiled


def model_of_8b(layers):
    """With layers of the shape of those of Llama-3.1-8B, in bfloat16."""
    config = ModelConfig.from_hf(
        {**RANDOM["llama-3.1-8b"], "num_hidden_layers": layers, "vocab_size": 1024}
    )
    return jax.eval_shape(lambda: with_output_factors(Llama.init(config, dtype=jnp.bfloat16)))


def decode_loop(model, *, batch, columns, kind, storage="model"):
    """Steps of decoding from a cache of so many slots a layer, and the cache's first stack."""
    never = jnp.asarray([-1])

    def start():
        plan = CachePlan(policy=Full(), headroom=0, storage=storage)
        cache = init_cache(
            model.layer_specs, plan, batch=batch, prompt_columns=columns, dtype=jnp.bfloat16
        )
        logits = jnp.zeros((batch, 61))
        return init_decode(logits, cache, row_keys(0, batch), jnp.full(batch, 9), never)

    def run(model, state):
        return decode_chunk(model, state, never, steps=4)

    state = jax.eval_shape(start)
    return compiled(run, model, state, kind=kind, donate_argnums=1), state.cache.stacks[0]


def copies_of(program, stack, *, positions=False):
    """Lines of the compiled program that copy all keys or values of a stack, or all positions."""
    shape = ",".join(map(str, stack.positions.shape))
    names = [f"[{shape},{stack.k.shape[-1]}]", *([f"[{shape}]"] if positions else [])]
    lines = (line.strip() for line in program.as_text().splitlines() if " copy(" in line)
    return [line for line in lines if any(name in line.split(" copy(")[0] for name in names)]


def prefill_of_128k(layers, kind):
    """The program, and the bytes of an array [T, D]."""
    model, columns = model_of_8b(layers), 131072
    tokens = jax.ShapeDtypeStruct((1, columns), jnp.int32)
    valid = jax.ShapeDtypeStruct(tokens.shape, bool)
    plan = CachePlan(policy=RestKV(), budget=1024, headroom=144)
    run = functools.partial(prefill, plans=(plan,))
    return compiled(run, model, tokens, valid, kind=kind), columns * 4096 * 2


def loop_over_int8_weights(layers, width, kind):
    """Steps of one token through matrices of int8, which have `width`² numbers each."""

    def steps(x, weights):
        def step(x, _):
            for w in weights:
                x = jnp.tanh(matmul(x, w))
            return x, None

        return jax.lax.scan(step, x, length=8)[0]

    shape = jax.ShapeDtypeStruct
    w = QuantArray(values=shape((width, width), jnp.int8), scale=shape((width,), jnp.float32))
    return compiled(steps, shape((1, width), jnp.bfloat16), [w] * layers, kind=kind)
