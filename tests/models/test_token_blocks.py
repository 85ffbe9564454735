"""Long prompts a block of tokens at a time: the same numbers, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from test_sharding import ATOL, config_of

from models import Gemma, Llama, token_blocks
from models.token_blocks import by_tokens
from restkv_jax.decode import CachePlan, SnapKV, prefill
from tests.restkv_jax.tiny import OPTIMISED


@pytest.fixture
def blocks_of_12(monkeypatch):
    monkeypatch.setattr(token_blocks, "_MOST_TOKENS", 12)
    jax.clear_caches()
    yield
    jax.clear_caches()  # what was traced with small blocks


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 24), (1, 29), (3, 11), (13, 3)])
def test_blocks_make_what_the_whole_makes(batch, tokens, dtype, over, blocks_of_12):
    x, y = (
        jax.random.normal(jax.random.key(i), (batch, tokens, 4 + i)).astype(dtype) for i in (0, 1)
    )
    seen = []

    def f(x, y):
        seen.append(x.shape[1])
        first = x * jnp.sum(y, axis=-1, keepdims=True)
        return first if over else (first, y[..., :2])

    found = jax.jit(lambda x, y: by_tokens(f, x, y, over=over))(x, y)
    assert min(seen) * batch <= max(12, batch)
    jax.tree.map(np.testing.assert_array_equal, found, f(x, y))


@pytest.mark.parametrize("over", [False, True])
def test_bfloat16_stays_as_it_is(over, blocks_of_12):
    """XLA:CPU would turn whole arrays into float32 and back, to write a block or an entry."""
    x = jax.ShapeDtypeStruct((1, 1009, 8), jnp.bfloat16)
    program = jax.jit(lambda x: by_tokens(lambda x: x * 2, x, over=over)).lower(x)
    text = program.compile(compiler_options=OPTIMISED).as_text()
    assert "bf16[1,1009,8]" in text
    assert "f32[1,1009,8]" not in text


def test_derivatives_of_blocks(blocks_of_12):
    x, y = (jax.random.normal(jax.random.key(i), (2, 17, 5)) for i in (0, 1))

    def loss(x, y, w, in_blocks):
        def f(x, y):
            return jnp.tanh(x * w) + y

        return jnp.sum((by_tokens(f, x, y, over=True) if in_blocks else f(x, y)) ** 3)

    w = jnp.linspace(0.5, 2, 5)
    ours, expected = (jax.grad(loss, (0, 1, 2))(x, y, w, how) for how in (True, False))
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("network", [Llama, Gemma])
def test_networks_give_the_same_logits(network, monkeypatch):
    changes = {} if network is Llama else {"architecture": "Gemma2ForCausalLM", "post_norms": True}
    model = network.init(config_of(**changes), seed=4)
    ids = jax.random.randint(jax.random.key(0), (2, 29), 0, 64)
    places = jnp.broadcast_to(jnp.arange(29), (2, 29))
    whole = jax.jit(dense_logits)(model, ids, places)
    monkeypatch.setattr(token_blocks, "_MOST_TOKENS", 12)
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        in_blocks = jax.jit(dense_logits)(model, ids, places)
    jax.clear_caches()
    np.testing.assert_allclose(in_blocks, whole, atol=ATOL)


def test_memory_of_a_prefill(monkeypatch):
    """In blocks no array of all tokens' inner activations, and no more for more layers."""
    columns, width, inner = 4096, 32, 512

    def temporary(layers):
        config = config_of(
            hidden_size=width, mlp_size=inner, num_layers=layers, windows=(None,) * layers
        )
        model = jax.eval_shape(lambda: Llama.init(config))
        prompt = (jax.ShapeDtypeStruct((1, columns), dtype) for dtype in (jnp.int32, jnp.bool_))
        start = functools.partial(prefill, plans=(CachePlan(policy=SnapKV(), budget=64),))
        program = jax.jit(start).lower(model, *prompt).compile(compiler_options=OPTIMISED)
        return program.memory_analysis().temp_size_in_bytes

    stream = columns * width * 4
    whole = temporary(2)
    assert whole > columns * inner * 4
    monkeypatch.setattr(token_blocks, "_MOST_TOKENS", 256)
    jax.clear_caches()
    two, five = temporary(2), temporary(5)
    jax.clear_caches()
    assert two < whole - columns * inner * 4 / 2
    assert five - two < stream
