"""Programs through XLA's compiler for GPU, for an H200, on any host.

What it makes of them shows without a GPU: memory, copies, and how many kernels are launched. Triton
kernels are compiled before, by Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS
from pallas_kernels.masked_eviction import masked_eviction
from pallas_kernels.masked_eviction.specs import SPECS as EVICTIONS
from pallas_kernels.window_scores import window_scores
from pallas_kernels.window_scores.specs import SPECS as SCORES
from restkv_jax.decode import CachePlan, LayerSpec, RestKV, SnapKV, with_output_factors
from restkv_jax.prompt_attention import causal_attention
from tests.pallas_kernels.lowering import GPU, compiled, needs_cuda_plugin
from tests.pallas_kernels.programs import (
    FULL,
    copies_of,
    decode_loop,
    kernels_of_the_loop,
    loop_over_int8_weights,
    model_of_8b,
    prefill_of_128k,
    prefill_split_by_the_caller,
    sharded_model_of_8b,
    turns_of,
)
from tests.restkv_jax import tiny

pytestmark = [pytest.mark.gpu_aot, needs_cuda_plugin]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_decode_attention(spec, dtype):
    run = functools.partial(decode_attention, **spec.options)
    new, given = None, ()
    if spec.sets == 1:
        new, given = jax.eval_shape(lambda: spec.new(dtype)), (1, 2, 3)
    program = compiled(run, *spec.shapes(dtype), new, kind=GPU, donate_argnums=given)
    assert "triton_kernel_call" in program.as_text()
    # No copy of a layer: what XLA makes on the way is smaller than the layer's keys.
    temporary = program.memory_analysis().temp_size_in_bytes
    assert spec.slots < 128 or temporary < spec.read_bytes(dtype) / 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SCORES, ids=lambda spec: spec.name)
def test_window_scores(spec, dtype):
    """Their largest array is what is given, or the scores: no weights, no projections.

    Beside it, what does not grow with the keys: outputs of the parts, factors in three of bfloat16.
    """
    run = functools.partial(window_scores, form=spec.form)
    program = compiled(run, *spec.shapes(dtype), kind=GPU)
    assert "triton_kernel_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 22e6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("spec", EVICTIONS, ids=lambda spec: spec.name)
def test_masked_eviction(spec, dtype):
    run = functools.partial(masked_eviction, **spec.options)
    program = compiled(run, *spec.shapes(dtype), kind=GPU)
    assert "triton_kernel_call" in program.as_text()


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(num_heads=32, num_kv_heads=8, head_dim=128, scale=0.088),
        LayerSpec(num_heads=8, num_kv_heads=2, head_dim=128, scale=0.088, window=4096),
        LayerSpec(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125),
    ],
    ids=str,
)
def test_attention_of_a_prompt_by_cudnn(spec):
    def shape(heads):
        return jax.ShapeDtypeStruct((1, heads, 8192, spec.head_dim), jnp.bfloat16)

    run = functools.partial(causal_attention, spec=spec, rows=32)
    args = shape(spec.num_heads), *[shape(spec.num_kv_heads)] * 2
    program = compiled(run, *args, jax.ShapeDtypeStruct((1,), jnp.int32), kind=GPU)
    assert "__cudnn$fmhaSoftmax" in program.as_text()


@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scanned", [False, True])
def test_the_decode_loop_copies_no_cache(scanned, batch, storage):
    """Not even positions, of which XLA would keep a version for each layer."""
    model = tiny.make(layers=4, heads=4, kv_heads=2, size=128, width=256)
    if scanned:
        model = tiny.ScannedModel(model.params, model.layer_specs)
    model = tiny.cast(model, jnp.bfloat16)
    plan = dataclasses.replace(FULL, storage=storage)
    program, stack = decode_loop(model, batch=batch, columns=1024, kind=GPU, plan=plan)
    # To write an entry and attend to parts of the slots, and to put these together.
    launches = program.as_text().count('custom_call_target="triton_kernel_call')
    assert launches == (2 if scanned else 8)
    assert copies_of(program, stack) == []


@pytest.mark.parametrize("policy", [SnapKV(), RestKV()], ids=lambda policy: policy.name)
def test_eviction_asks_the_host_once_a_step(policy):
    """Not once a layer: a host waits for what decides on a loop, if its turns are not known.

    Nor for a layer's output projection, where its factor is at hand.
    """
    model = tiny.cast(tiny.make(layers=3, heads=4, kv_heads=2, size=128, width=256), jnp.bfloat16)
    model = jax.eval_shape(with_output_factors, model)
    plan = CachePlan(policy=policy, budget=256, decode_budget=256, evict_every=64)
    program, stack = decode_loop(model, batch=3, columns=1024, kind=GPU, plan=plan)
    # Of steps, of eviction, of its layers, and of the heads of the adaptive window.
    turns = Counter([4, None, 3] + [2] * (policy.name == "restkv"))
    assert Counter(turns_of(program)) == turns
    assert copies_of(program, stack) == []


@pytest.mark.parametrize("evicts", [False, True])
def test_decoding_on_four_gpus(evicts):
    """Two split the rows and two the heads: each runs its kernels on its own, in place.

    They talk as the model needs, and where rows are split once a step about eviction.
    """
    layers = 3
    plan = CachePlan(policy=SnapKV(), budget=256, decode_budget=256, evict_every=64)
    program, stack = decode_loop(
        sharded_model_of_8b(layers, GPU),
        batch=4,
        columns=1168,
        kind=GPU,
        plan=plan if evicts else FULL,
    )
    text = program.as_text()
    # Two kernels attend; evicting, two score and two select and move, in a loop over layers.
    assert text.count('custom_call_target="triton_kernel_call') == layers * 2 + 4 * evicts
    assert copies_of(program, stack) == []
    # Behind two projections of each layer, for the embedding, and for what is sampled.
    assert len(re.findall(r" all-reduce(-start)?\(", text)) == 2 * layers + 2 + evicts
    # One bit, alone or beside what it was made of.
    bits = re.findall(r" = (\(\(pred\[\]\), )?pred\[\]\)? all-reduce(-start)?\(", text)
    assert len(bits) == evicts
    # One loop of steps; around the layers, of them, and within it for the rows of this device.
    assert text.count(" while(") == 1 + 3 * evicts


@pytest.mark.parametrize("check", [True, False])
def test_kernels_in_a_shard_map_of_the_callers_own(check):
    """All of them pass its check."""
    text = prefill_split_by_the_caller(GPU, check).as_text()
    # One scores, two select and move.
    assert text.count('custom_call_target="triton_kernel_call') == 3


@pytest.mark.parametrize(("batch", "most"), [(1, 17), (16, 15)])
def test_kernels_of_a_decode_step(batch, most):
    """Launching them takes about as long as reading the cache does: as few a layer as there are.

    Nor does any of them write products of activations and weights that are not summed up.
    """
    programs = [
        decode_loop(model_of_8b(layers), batch=batch, columns=1168, kind=GPU)[0]
        for layers in (2, 3)
    ]
    two, three = map(kernels_of_the_loop, programs)
    assert three - two <= most
    assert programs[0].memory_analysis().temp_size_in_bytes < 4096 * 1024 * 2


@pytest.mark.parametrize("layers", [2, 3])
def test_a_prefill_of_128k(layers):
    """Of the shape of Llama-3.1-8B: arrays [T, D], with another layer less than 2 % of one more.

    The host waits for nothing until its end.
    """
    program, array = prefill_of_128k(layers, GPU)
    assert None not in turns_of(program)
    assert program.memory_analysis().temp_size_in_bytes < (4.57 + 0.02 * layers) * array


@pytest.mark.parametrize("rows", [1, 16])
def test_a_loop_holds_no_copy_of_int8_weights(rows):
    """Each step reads the int8 weights; products convert them on the way."""
    width = 4096
    program = loop_over_int8_weights(4, width, GPU, rows=rows)
    assert program.memory_analysis().temp_size_in_bytes < width * width / 4
