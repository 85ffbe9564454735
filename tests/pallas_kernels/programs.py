"""Whole programs to compile for devices that are not here; of shapes alone.

`JAX_PLATFORMS=cpu python -m tests.pallas_kernels.programs` prints what XLA makes of Llama-3.1-8B on
an H200: launches of a decode step, and memory of a prefill of 131,072 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.efficiency.subject import RANDOM
from models import Llama, ModelConfig
from models.matmul import matmul
from models.registry import make_network
from models.sharding import weight_sharding
from pallas_kernels.quantized import QuantArray
from restkv_jax.cache import init_cache
from restkv_jax.decode import (
    CachePlan,
    Full,
    MeshRules,
    RestKV,
    ShardedLM,
    SnapKV,
    decode_chunk,
    init_decode,
    prefill,
    row_keys,
    with_output_factors,
)
from tests.pallas_kernels.lowering import GPU, compiled, compiled_on_mesh, mesh
from tests.restkv_jax import tiny

# Instructions that become no kernel.
_FREE = re.compile(r" (get-tuple-element|parameter|bitcast|constant|tuple|after-all)\(")


def model_of_8b(layers):
    """With layers of the shape of those of Llama-3.1-8B, in bfloat16."""
    config = _config_of_8b(layers)
    return jax.eval_shape(lambda: with_output_factors(Llama.init(config, dtype=jnp.bfloat16)))


def prefill_split_by_the_caller(kind, check):
    """A compiled prefill in a `jax.shard_map` over rows, on four devices."""
    devices = mesh(kind)
    rows, everywhere = PartitionSpec(devices.axis_names), PartitionSpec()
    model = tiny.cast(tiny.make(layers=1, heads=8, kv_heads=4, size=64, width=128), jnp.bfloat16)
    plan = CachePlan(policy=SnapKV(), budget=64)
    run = jax.shard_map(
        lambda model, tokens, valid: prefill(model, tokens, valid, plans=(plan,)),
        mesh=devices,
        in_specs=(everywhere, rows, rows),
        out_specs=rows,
        check_vma=check,
    )

    def on(spec, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, spec))

    model = jax.tree.map(functools.partial(on, everywhere), model)
    tokens = jnp.zeros((4, 512), jnp.int32)
    return compiled_on_mesh(run, model, on(rows, tokens), on(rows, tokens == 0), kind=kind)


def sharded_model_of_8b(layers, kind):
    """The same on a mesh of four devices."""
    rules = MeshRules(mesh(kind))
    place = weight_sharding(rules)

    def weight(path, shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place(path, shape))

    factored = model_of_8b(layers)
    by_head = rules.sharding("query_heads")
    factors = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_head) for x in factored.factors]
    network = make_network(_config_of_8b(layers), weight)
    factored = dataclasses.replace(factored, model=network, factors=tuple(factors))
    return ShardedLM(model=factored, rules=rules)


def _config_of_8b(layers):
    return ModelConfig.from_hf(
        {**RANDOM["llama-3.1-8b"], "num_hidden_layers": layers, "vocab_size": 1024}
    )


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

    state, compile_for = jax.eval_shape(start), compiled
    if isinstance(model, ShardedLM):
        compile_for, shardings = compiled_on_mesh, model.rules.shardings(state)
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            shardings,
        )
    return compile_for(run, model, state, kind=kind, donate_argnums=1), state.cache.stacks[0]


def copies_of(program, stack):
    """Lines of the program that copy all of a stack's keys, values, positions or scales."""
    positions, size = stack.positions, stack.k.shape[-1]
    of_device = getattr(positions, "sharding", None)
    local = of_device.shard_shape(positions.shape) if of_device else positions.shape
    shape = ",".join(map(str, local))
    names = f"[{shape},{size}]", f"[{shape}]"
    lines = (line.strip() for line in program.as_text().splitlines() if " copy(" in line)
    return [line for line in lines if any(name in line.split(" copy(")[0] for name in names)]


def turns_of(program):
    """How many turns each loop takes; None where a host has to wait for what decides on it."""
    assert " conditional(" not in program.as_text()
    loops = (line for line in program.as_text().splitlines() if " while(" in line)
    known = (re.search(r'"known_trip_count":\{"n":"(\d+)"', line) for line in loops)
    return [turns and int(turns[1]) for turns in known]


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
