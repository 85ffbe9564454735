"""Weights of int8: against products in float64, and through loading, meshes and compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from model_fixtures import checkpoints
from test_sharding import config_of

import models
from models import Gemma, Llama, convert
from models.matmul import _FEW_ROWS, lookup, matmul
from models.sharding import place_weights, weight_sharding
from models.weights import named_parameters, quantize_weights, weights_bytes
from pallas_kernels.quantized import QuantArray, quantize
from restkv_jax.decode import (
    CachePlan,
    Full,
    MeshRules,
    decode_chunk,
    init_decode,
    pad_prompts,
    prefill,
    row_keys,
)
from tests.restkv_jax.tiny import OPTIMISED

INPUTS, OUTPUTS = 96, 80
OUTPUT_FACTOR = np.logspace(-2, 2, OUTPUTS)[:, None]


def example(rows, dtype):
    """Activations of which some are far larger than the rest, and weights of all magnitudes."""
    r = np.random.default_rng(0)
    x = r.standard_normal((*rows, INPUTS))
    x[..., 0] *= 50
    w = quantize(jnp.asarray(r.standard_normal((OUTPUTS, INPUTS)) * OUTPUT_FACTOR))
    return jnp.asarray(x, dtype), w


def numbers(w):
    """What a matrix of int8 stands for, in float64."""
    return np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)[:, None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("rows", [(1,), (3,), (1, 1), (2, _FEW_ROWS // 2), (2, _FEW_ROWS)], ids=str)
def test_products_are_of_the_weights_as_rounded(rows, dtype):
    x, w = example(rows, dtype)
    exact = np.asarray(x, np.float64) @ numbers(w).T
    ours = jax.jit(functools.partial(matmul, dtype=jnp.float32))(x, w)
    few = np.prod(rows) <= _FEW_ROWS
    # Two rows of int8 leave half of 1 / 127² of the largest; floats round in the last place alone.
    largest = np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True)
    left = 0.5 / 127**2 * largest * np.abs(numbers(w)).sum(1) if few else 0
    assert (np.abs(ours - exact) <= left + 1e-5 * np.abs(w.scale) * 127 * largest).all()
    rounded = matmul(x, w)
    assert rounded.dtype == dtype
    np.testing.assert_allclose(
        rounded.astype(jnp.float32), ours, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-6, atol=1e-5
    )


@pytest.mark.parametrize("rows", [0, 4, _FEW_ROWS + 1])
def test_rows_do_not_meet(rows):
    x, w = example((rows,), jnp.float32)
    whole = matmul(x, w)
    assert whole.shape == (rows, OUTPUTS)
    if rows:
        broken = matmul(x.at[0, 0].set(jnp.nan), w)
        assert np.isnan(broken[0]).all()
        np.testing.assert_array_equal(broken[1:], whole[1:])


def test_one_row_of_int8_would_not_do():
    """The bound above is far below what rounding activations once would cost."""
    x, w = example((8,), jnp.float32)
    exact = np.asarray(x, np.float64) @ numbers(w).T
    once = numbers(quantize(x)) @ numbers(w).T
    error, twice = (np.abs(y - exact) / OUTPUT_FACTOR.T for y in (once, matmul(x, w)))
    assert twice.max() < error.max() / 50


@pytest.mark.parametrize("rows", [2, _FEW_ROWS + 1])
def test_derivatives_are_those_of_the_products(rows):
    x, w = example((rows,), jnp.float32)

    def total(x, scale):
        return jnp.sum(jnp.sin(matmul(x, QuantArray(values=w.values, scale=scale))))

    of_x, of_scale = jax.grad(total, (0, 1))(x, w.scale)
    y = np.asarray(x, np.float64) @ numbers(w).T
    slope = np.cos(np.asarray(matmul(x, w), np.float64))
    by_scale = (slope * y / np.asarray(w.scale, np.float64)).sum(0)
    for ours, exact in ((of_x, slope @ numbers(w)), (of_scale, by_scale)):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_rows_of_a_table():
    _, w = example((1,), jnp.float32)
    at = jnp.asarray([[3, 0], [79, 3]])
    np.testing.assert_allclose(
        lookup(w, at, jnp.float32), numbers(w)[np.asarray(at)], rtol=1e-6, atol=0
    )
    assert lookup(w, at, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_is_rounded_by_output_and_nothing_else(tied):
    model = Llama.init(config_of(qkv_bias=True, tied_embeddings=tied), seed=1)
    before, after = named_parameters(model), named_parameters(quantize_weights(model))
    assert before.keys() == after.keys()
    for path, value in before.items():
        if value.ndim == 1:
            assert after[path] is value
            continue
        by_output = np.asarray(value if path == "embed.w" else value.T)
        error = np.abs(numbers(after[path]) - by_output)
        largest = np.abs(by_output).max(axis=1, keepdims=True)
        assert (error <= largest / 254 * 1.001).all(), path
        assert (np.abs(np.asarray(after[path].values)).max(axis=1) == 127).all()
    with pytest.raises(ValueError, match="model: expected weights of floats, got int8"):
        quantize_weights(quantize_weights(model))


@pytest.mark.parametrize("network", [Llama, Gemma])
def test_logits_stay_close(network):
    changes = {} if network is Llama else {"architecture": "Gemma2ForCausalLM", "post_norms": True}
    model = network.init(config_of(tied_embeddings=network is Gemma, **changes), seed=2)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
    places = jnp.broadcast_to(jnp.arange(9), (2, 9))
    exact = dense_logits(model, ids, places)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(dense_logits)(quantize_weights(model), ids, places)
    assert ours.dtype == jnp.float32
    # Logits are of size 1; 255 levels in each of two layers' seven matrices.
    assert 0 < np.abs(ours - exact).mean() < 0.02


@pytest.fixture(scope="module")
def folder():
    return checkpoints("hf_tiny/*", wants="goldens.npz")[0].values[0]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, named_parameters(one), named_parameters(other))


def test_loading_rounds_what_is_stored(folder, tmp_path):
    loaded = models.load(folder, dtype="int8")
    exact = models.load(folder)
    own = named_parameters(loaded.model)
    for path, value in named_parameters(quantize_weights(exact.model)).items():
        if isinstance(value, QuantArray):
            jax.tree.map(np.testing.assert_array_equal, own[path], value)
        else:
            assert own[path].dtype == jnp.bfloat16
    assert loaded.model.kv_dtype == jnp.bfloat16
    assert loaded.weights_bytes == weights_bytes(loaded.model) < exact.weights_bytes / 3
    convert.convert(folder, tmp_path / "orbax")
    assert_same(models.load(tmp_path / "orbax", dtype="int8").model, loaded.model)


def test_a_mesh_splits_int8_as_it_splits_floats():
    floats = Llama.init(config_of(), seed=3)
    model, rules = quantize_weights(floats), MeshRules.over(data=2, model=4)
    placed = place_weights(model, rules)
    assert_same(placed, model)
    split = named_parameters(place_weights(floats, rules))
    for path, value in named_parameters(placed).items():
        if isinstance(value, QuantArray):
            shard_shape = value.values.sharding.shard_shape(value.shape)
            floats_shape = split[path].sharding.shard_shape(split[path].shape)
            assert shard_shape == (floats_shape if path == "embed.w" else floats_shape[::-1])
            assert value.scale.sharding.shard_shape(value.scale.shape) == shard_shape[:1]


def test_loading_onto_a_mesh():
    for case in checkpoints("hf_tiny/qwen3*"):
        (folder,) = case.values
        single = models.load(folder, dtype="int8")
        rules = MeshRules.over(data=2, model=int(np.gcd(single.config.num_kv_heads, 2)))
        loaded = models.load(folder, dtype="int8", sharding=weight_sharding(rules)).model
        assert_same(loaded, single.model)
        wanted = named_parameters(place_weights(single.model, rules))
        for path, value in named_parameters(loaded).items():
            ours, theirs = jax.tree.leaves(value), jax.tree.leaves(wanted[path])
            for leaf, target in zip(ours, theirs, strict=True):
                assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim), path


@pytest.mark.parametrize("what", ["decoding", "prefill"])
def test_programs_hold_no_floats_of_all_weights(what):
    config = config_of(hidden_size=256, mlp_size=1024, num_layers=4, windows=(None,) * 4)
    model = jax.eval_shape(lambda: Llama.init(config, dtype=jnp.int8))
    columns = 96
    tokens, valid = pad_prompts([list(range(60))], columns=columns)
    plan, never = CachePlan(policy=Full(), headroom=16), jnp.asarray([-1])
    start = functools.partial(prefill, plans=(plan,))
    if what == "prefill":
        lowered = jax.jit(start).lower(model, tokens, valid)
    else:
        logits, (cache,) = jax.eval_shape(start, model, tokens, valid)
        state = jax.eval_shape(init_decode, logits, cache, row_keys(0, 1), jnp.full(1, 9), never)
        lowered = decode_chunk.lower(model, state, never, steps=4)
    program = lowered.compile(compiler_options=OPTIMISED)
    # Of all layers as bfloat16, one in three at the most are alive at any time.
    floats = 2 * 4 * 3 * 256 * 1024
    assert program.memory_analysis().temp_size_in_bytes < floats / 3
