"""Random models: what tests elsewhere build, in every variant the configuration knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits

from models import Llama, ModelConfig
from models.rope import RopeConfig, rope_angles
from models.weights import parameter_shapes, weights_bytes

VARIANTS = [
    {},
    {"tied_embeddings": True},
    {"qkv_bias": True},
    {"qkv_bias": True, "out_bias": True, "qk_norm": True},
    {"windows": (3, None)},
]
TOKENS = jnp.arange(8)[None] % 5
POSITIONS = jnp.arange(8)[None]


def config_of(**changes):
    base = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 48,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_size": 40,
        "rms_eps": 1e-5,
        "rope": RopeConfig(),
        "windows": (None, None),
    }
    return ModelConfig(**(base | changes))


@pytest.mark.parametrize("changes", VARIANTS)
def test_init(changes):
    config = config_of(**changes)
    model = Llama.init(config, seed=1)
    shapes = parameter_shapes(config)
    leaves = jax.tree.leaves(model)
    assert sorted(leaf.shape for leaf in leaves) == sorted(shapes.values())
    assert weights_bytes(model) == sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert model.layer_specs == config.layer_specs
    logits = dense_logits(model, TOKENS, POSITIONS)
    assert 0.3 < float(jnp.std(logits)) < 3
    same = dense_logits(Llama.init(config, seed=1), TOKENS, POSITIONS)
    other = dense_logits(Llama.init(config, seed=2), TOKENS, POSITIONS)
    np.testing.assert_array_equal(same, logits)
    assert not jnp.allclose(other, logits)


def test_window_hides_what_is_far():
    changed = TOKENS.at[0, 0].set(7)
    for windows, reaches in (((2, 2), False), ((None, 2), True)):
        model = Llama.init(config_of(windows=windows))
        before = dense_logits(model, TOKENS, POSITIONS)[0, -1]
        after = dense_logits(model, changed, POSITIONS)[0, -1]
        assert bool(jnp.any(before != after)) is reaches


def test_padding_has_the_angles_of_position_zero():
    angles = rope_angles(RopeConfig(), 16, jnp.array([[-1, 0, 1]]))
    np.testing.assert_array_equal(angles[0, 0], angles[0, 1])
    assert jnp.all(angles[0, 2] > 0)
