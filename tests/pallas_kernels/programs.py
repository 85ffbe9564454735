"""Whole programs to compile for devices that are not here; of shapes alone.

`JAX_PLATFORMS=cpu python -m tests.pallas_kernels.programs` prints what XLA makes of Llama-3.1-8B on
an H200: launches of a decode step, and memory of a prefill of 131,072 tokens.
"""

from __future__ import annotations

import functools
import re

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
from tests.pallas_kernels.lowering import GPU, compiled

# Instructions that become no kernel.
_FREE = re.compile(r" (get-tuple-element|parameter|bitcast|constant|tuple|after-all)\(")


def model_of_8b(layers):
    """With layers of the shape of those of Llama-3.1-8B, in bfloat16."""
    config = ModelConfig.from_hf(
        {**RANDOM["llama-3.1-8b"], "num_hidden_layers": layers, "vocab_size": 1024}
    )
    return jax.eval_shape(lambda: with_output_factors(Llama.init(config, dtype=jnp.bfloat16)))


FULL = CachePlan(policy=Full(), headroom=0)


def decode_loop(model, *, batch, columns, kind, plan=FULL):
    """Steps of decoding from the cache of so long a prompt, and the cache's first stack."""
    never = jnp.asarray([-1])

    def start():
        cache = init_cache(
            model.layer_specs, plan, batch=batch, prompt_columns=columns, dtype=jnp.bfloat16
        )
        logits = jnp.zeros((batch, 61))
        return init_decode(logits, cache, row_keys(0, batch), jnp.full(batch, 9), never)

    def run(model, state):
        return decode_chunk(model, state, never, steps=4)

    state = jax.eval_shape(start)
    return compiled(run, model, state, kind=kind, donate_argnums=1), state.cache.stacks[0]


def copies_of(program, stack):
    """Lines of the program that copy all of a stack's keys, values, positions or scales."""
    shape = ",".join(map(str, stack.positions.shape))
    names = f"[{shape},{stack.k.shape[-1]}]", f"[{shape}]"
    lines = (line.strip() for line in program.as_text().splitlines() if " copy(" in line)
    return [line for line in lines if any(name in line.split(" copy(")[0] for name in names)]


def kernels_of_the_loop(program):
    """How many kernels the longest computation launches, besides `main`: the body of the loop."""
    bodies = re.findall(r"\n(%[^\n]*\) -> [^\n]*\{\n.*?)\n\}", program.as_text(), re.DOTALL)
    unfused = [body.splitlines()[1:] for body in bodies if not body.startswith("%fused")]
    return max(sum(not _FREE.search(line) for line in lines) for lines in unfused)


def prefill_of_128k(layers, kind):
    """The program, and the bytes of an array [T, D]."""
    model, columns = model_of_8b(layers), 131072
    tokens = jax.ShapeDtypeStruct((1, columns), jnp.int32)
    valid = jax.ShapeDtypeStruct(tokens.shape, bool)
    plan = CachePlan(policy=RestKV(), budget=1024, headroom=144)
    run = functools.partial(prefill, plans=(plan,))
    return compiled(run, model, tokens, valid, kind=kind), columns * 4096 * 2


def loop_over_int8_weights(layers, width, kind, *, rows=1):
    """Steps of so many tokens through matrices of int8, which have `width`² numbers each."""

    def steps(x, weights):
        def step(x, _):
            for w in weights:
                x = jnp.tanh(matmul(x, w))
            return x, None

        return jax.lax.scan(step, x, length=8)[0]

    shape = jax.ShapeDtypeStruct
    w = QuantArray(values=shape((width, width), jnp.int8), scale=shape((width,), jnp.float32))
    return compiled(steps, shape((rows, width), jnp.bfloat16), [w] * layers, kind=kind)


def main() -> None:
    layers = 32
    for batch in (1, 16):
        program, stack = decode_loop(model_of_8b(layers), batch=batch, columns=1168, kind=GPU)
        print(
            f"decoding, batch {batch}: {kernels_of_the_loop(program)} launches,",
            f"{len(copies_of(program, stack))} copies of a cache,",
            f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB",
        )
    memory = prefill_of_128k(layers, GPU)[0].memory_analysis()
    print(
        f"prefill: {memory.temp_size_in_bytes / 1e9:.2f} GB,",
        f"and {memory.output_size_in_bytes / 1e9:.2f} GB of cache",
    )


if __name__ == "__main__":
    main()
