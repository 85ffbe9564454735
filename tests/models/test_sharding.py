"""Weights on a mesh: where the table puts them, and that the network computes the same there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from jax.sharding import AxisType, PartitionSpec
from model_fixtures import checkpoints

import models
from models import Gemma, Llama, ModelConfig
from models.rope import RopeConfig
from models.sharding import logical_axes, place_weights, weight_sharding
from models.weights import named_parameters, parameter_shapes, quantize_weights
from restkv_jax.decode import (
    CachePlan,
    MeshRules,
    RestKV,
    extend,
    generate,
    prefill,
    shard,
    with_output_factors,
)

# Sums of the same numbers in another order.
ATOL = 2e-5


def config_of(**changes):
    base = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 64,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "mlp_size": 40,
        "rms_eps": 1e-5,
        "rope": RopeConfig(),
        "windows": (None, None),
    }
    return ModelConfig(**(base | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "out_bias": True, "qk_norm": True},
        {"architecture": "Gemma2ForCausalLM", "post_norms": True, "tied_embeddings": True},
    ],
    ids=["llama", "gemma"],
)
def test_every_projection_is_split_and_every_norm_is_whole(changes):
    rules = MeshRules.over(data=2, model=4)
    for path, shape in parameter_shapes(config_of(**changes)).items():
        local = weight_sharding(rules)(path, shape).shard_shape(shape)
        whole = path.endswith(("norm.w", "attn.o.b"))
        assert np.prod(local) * (1 if whole else 4) == np.prod(shape), path


def test_sizes_that_do_not_split_are_left_whole():
    rules = MeshRules.over(data=2, model=4)
    shapes = parameter_shapes(config_of(vocab_size=61, mlp_size=42))
    for path in ("embed.w", "head.w", "layers.1.mlp.up.w", "layers.1.mlp.down.w"):
        assert logical_axes(path) != ()
        assert weight_sharding(rules)(path, shapes[path]).shard_shape(shapes[path]) == shapes[path]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_network_on_a_mesh_generates_what_it_does_on_one_device(weights):
    model = Llama.init(config_of(), seed=3)
    if weights == "int8":
        model = quantize_weights(model)
    rules = MeshRules.over(data=2, model=4)
    placed = place_weights(model, rules)
    for path, value in named_parameters(placed).items():
        if weights == "float32":
            assert value.sharding == weight_sharding(rules)(path, value.shape)
        jax.tree.map(np.testing.assert_array_equal, value, named_parameters(model)[path])
    r = np.random.default_rng(0)
    prompts = [r.permutation(64)[:n].tolist() for n in (40, 61, 17, 50)]
    plan = CachePlan(policy=RestKV(window=4), budget=12, headroom=16)
    ours, expected = (
        generate(lm, prompts, plan=plan, max_new_tokens=9, chunk=8)
        for lm in (shard(with_output_factors(placed), rules), model)
    )
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    # Of int8, activations near the middle of two levels are rounded the other way.
    atol = ATOL if weights == "float32" else 5 * ATOL
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=atol)
    for layer in range(2):
        np.testing.assert_array_equal(
            ours.cache.kept_positions(layer), expected.cache.kept_positions(layer)
        )
    sizes = {leaf.addressable_shards[0].data.size * 8 for leaf in [ours.cache.stacks[0].k]}
    assert sizes == {expected.cache.stacks[0].k.size}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_network_passes_the_check_of_a_shard_map(weights):
    """One that a caller writes around it, over rows."""
    dtype = jnp.float32 if weights == "float32" else jnp.bfloat16
    model = Llama.init(config_of(windows=(None, 9)), dtype=dtype)
    plan = CachePlan(policy=RestKV(window=4), budget=12)
    if weights == "int8":
        model = quantize_weights(model)
    mesh = jax.make_mesh((4,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:4])
    rows = PartitionSpec("rows")

    def run(model, tokens):
        _, (cache,) = prefill(model, tokens, tokens >= 0, plans=(plan,))
        return extend(model, cache, tokens[:, :1])[0]

    split = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    tokens = jnp.tile(jnp.arange(20), (4, 1))
    assert jax.eval_shape(split, model, tokens).shape == (4, 1, 64)


@pytest.mark.parametrize("folder", checkpoints("hf_tiny/qwen3*"))
def test_fixtures_load_onto_a_mesh(folder):
    single = models.load(folder)
    shards = int(np.gcd(single.config.num_kv_heads, 2))
    rules = MeshRules.over(data=2, model=shards)
    placed = models.load(folder, sharding=weight_sharding(rules)).model
    ids = jnp.arange(9)[None]
    np.testing.assert_allclose(
        jax.jit(dense_logits)(placed, ids, ids), dense_logits(single.model, ids, ids), atol=ATOL
    )


def test_another_family_is_placed_as_its_own_class():
    config = config_of(architecture="Gemma2ForCausalLM", post_norms=True, unit_offset=True)
    placed = place_weights(Gemma.init(config), MeshRules.over(data=2, model=4))
    assert isinstance(placed, Gemma)
