"""Kernels through the TPU's own compiler: it refuses what lowering and the interpreter accept."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.masked_eviction import masked_eviction
from pallas_kernels.masked_eviction.specs import SPECS as EVICTIONS
from pallas_kernels.window_scores import window_scores
from pallas_kernels.window_scores.specs import SPECS as SCORES
from restkv_jax.compression import compress
from restkv_jax.decode import CachePlan, LayerSpec, MeshRules, prefill
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import RestKV, SnapKV
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.sharding import ShardedLM
from tests.pallas_kernels.lowering import (
    TOPOLOGIES,
    compiled,
    compiled_on_mesh,
    mesh,
    needs_libtpu,
)
from tests.pallas_kernels.programs import (
    FULL,
    copies_of,
    decode_loop,
    loop_over_int8_weights,
    model_of_8b,
    prefill_of_128k,
    prefill_split_by_the_caller,
)
from tests.restkv_jax import tiny

pytestmark = [pytest.mark.tpu_aot, needs_libtpu]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_decode_attention(spec, kind, dtype):
    inputs = spec.shapes(dtype)
    for weights in (False, True):
        run = functools.partial(decode_attention, **spec.options, weights=weights)
        check_decode_attention(spec, dtype, compiled(run, *inputs, kind=kind))
    if spec.sets == 1:
        new = jax.eval_shape(lambda: spec.new(dtype))
        program = compiled(run, *inputs, new, kind=kind, donate_argnums=(1, 2, 3))
        check_decode_attention(spec, dtype, program)


def check_decode_attention(spec, dtype, program):
    assert "tpu_custom_call" in program.as_text()
    # No copy of a layer: what XLA makes on the way is smaller than the layer's keys.
    temporary = program.memory_analysis().temp_size_in_bytes
    assert spec.slots < 128 or temporary < spec.read_bytes(dtype) / 2


@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize("scanned", [False, True])
def test_the_decode_loop_copies_no_cache(scanned, storage):
    """The kernel sees the stack of layers as it is, and writes it in place."""
    model = tiny.make(layers=4, heads=4, kv_heads=2, size=128, width=256)
    if scanned:
        model = tiny.ScannedModel(model.params, model.layer_specs)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    plan = dataclasses.replace(FULL, storage=storage)
    program, stack = decode_loop(model, batch=2, columns=1024, kind="TPU v5e", plan=plan)
    assert program.as_text().count("tpu_custom_call") == (1 if scanned else 4)
    assert copies_of(program, stack) == []


@pytest.mark.parametrize("batch", [1, 4])
def test_the_decode_loop_copies_no_weights(batch):
    """XLA would turn the matrices of queries, keys and values around, once for each chunk."""
    program, stack = decode_loop(model_of_8b(2), batch=batch, columns=1168, kind="TPU v6e")
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 1024 * 2
    assert copies_of(program, stack) == []


def test_a_loop_holds_no_floats_of_int8_weights():
    """Each step reads the int8 weights; products convert them on the way."""
    width = 2048
    program = loop_over_int8_weights(4, width, "TPU v5e")
    assert program.memory_analysis().temp_size_in_bytes < width * width / 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("spec", SCORES, ids=lambda spec: spec.name)
def test_window_scores(spec, kind, dtype):
    """Their largest array is what is given, or the scores: no weights, no projections."""
    inputs = spec.shapes(dtype)
    program = compiled(functools.partial(window_scores, form=spec.form), *inputs, kind=kind)
    assert "tpu_custom_call" in program.as_text()
    temporary = program.memory_analysis().temp_size_in_bytes
    assert not spec.large or temporary < spec.read_bytes(dtype) / 10


@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize(
    ("columns", "spec"),
    [
        (131_072, LayerSpec(num_heads=32, num_kv_heads=8, head_dim=128, scale=0.088)),
        (131_072, LayerSpec(num_heads=4, num_kv_heads=1, head_dim=256, scale=0.0625, window=512)),
        (8192, LayerSpec(num_heads=8, num_kv_heads=4, head_dim=256, scale=0.0625, softcap=50.0)),
        (4096, LayerSpec(num_heads=8, num_kv_heads=2, head_dim=96, scale=0.102, window=4096)),
        (4096, LayerSpec(num_heads=8, num_kv_heads=8, head_dim=80, scale=0.112)),
        (1100, LayerSpec(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)),
        (67, LayerSpec(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)),
    ],
    ids=str,
)
def test_splash_attention(columns, spec, kind):
    def shape(heads):
        return jax.ShapeDtypeStruct((1, heads, columns, spec.head_dim), jnp.bfloat16)

    q, k = shape(spec.num_heads), shape(spec.num_kv_heads)
    run = functools.partial(causal_attention, spec=spec, rows=32)
    program = compiled(run, q, k, k, jax.ShapeDtypeStruct((1,), jnp.int32), kind=kind)
    assert "splash_mha_fwd" in program.as_text()
    # Beside the result, of the size of the queries: what is scaled, padded and masked.
    assert columns < 1024 or program.memory_analysis().temp_size_in_bytes < 2 * 2 * q.size


KERNELS = ("window_scores", "eviction_threshold", "eviction_move")


def kernels_in(program):
    calls = [
        line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line
    ]
    return {name for name in ("splash_mha_fwd", *KERNELS) if any(name in call for call in calls)}


@pytest.mark.parametrize("check", [True, False])
def test_kernels_in_a_shard_map_of_the_callers_own(check):
    """With its check, which JAX's splash attention does not pass, all but that one."""
    program = prefill_split_by_the_caller("TPU v5e", check)
    found = kernels_in(program.as_text())
    assert found == ({*KERNELS} if check else {"splash_mha_fwd", *KERNELS})


def test_a_sharded_prefill_holds_all_kernels():
    """Two devices split the batch and two the heads: each runs its kernels on its own."""
    rules = MeshRules(mesh("TPU v5e"))
    model = tiny.cast(tiny.make(layers=1, heads=8, kv_heads=4, size=64, width=128), jnp.bfloat16)

    def on(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(*axes))

    sharded = jax.tree.map(on, ShardedLM(model=model, rules=rules))
    tokens = jnp.zeros((2, 512), jnp.int32)
    plan = CachePlan(policy=SnapKV(), budget=64)
    run = functools.partial(prefill, plans=(plan,))
    args = sharded, on(tokens, "batch"), on(tokens == 0, "batch")
    program = compiled_on_mesh(run, *args, kind="TPU v5e").as_text()
    assert kernels_in(program) == {"splash_mha_fwd", *KERNELS}
    # Of one row and half of the heads; what is written for all tokens is not gathered.
    assert "bf16[1,4,512,64]" in program
    assert "bf16[2,8,512,64]" not in program


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("spec", EVICTIONS, ids=lambda spec: spec.name)
def test_masked_eviction(spec, kind, dtype):
    run = functools.partial(masked_eviction, **spec.options)
    program = compiled(run, *spec.shapes(dtype), kind=kind)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize(
    "policy",
    [SnapKV(), RestKV(), RestKV(spatial="avgpool"), RestKV.paper(spatial="maxpool")],
    ids=repr,
)
def test_policies_make_no_weights_of_the_prompts_length(policy):
    """The weights that the reference would need are traced, but nothing is left of them.

    Of the adaptive window's search for the drift, one key head's weights and their masks.
    """
    heads, kv_heads, columns, size = 32, 8, 8192, 128
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    keys = shape((1, kv_heads, columns, size))
    inputs = shape((1, heads, policy.window, size)), keys, keys, shape((heads, size, 256))

    def run(*arrays):
        return compress(policy, layer_inputs(*arrays), capacity=512)

    program = compiled(run, *inputs, kind="TPU v5e")
    weights = 4 * heads * policy.window * columns
    part = 2 / kv_heads if policy == RestKV() else 1 / 100
    assert program.memory_analysis().temp_size_in_bytes < weights * part


@pytest.mark.parametrize("layers", [2, 3])
def test_memory_of_a_prefill_of_128k(layers):
    """Of the shape of Llama-3.1-8B: arrays [T, D], the same for any number of layers."""
    program, array = prefill_of_128k(layers, "TPU v6e")
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 6.05 * array
    # What is alive at once; the rest lies between arrays.
    assert memory.peak_memory_in_bytes - memory.argument_size_in_bytes < 3.8 * array
