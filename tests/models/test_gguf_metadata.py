"""What the metadata of a GGUF file may and may not say of the network."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import models
from models.gguf_model import read_config
from models.rope import FrequencyFactors, LinearScaling, RopeConfig


@dataclasses.dataclass
class Store:
    """A file, as far as a configuration is read from it."""

    metadata: dict
    tensors: dict = dataclasses.field(default_factory=dict)
    path: Path = Path("some.gguf")

    @property
    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name]


def store_of(architecture, tensors=None, *, layers=4, **own):
    sizes = {
        "block_count": layers,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    own = {key.replace("__", "."): value for key, value in own.items()}
    keys = {f"{architecture}.{key}": value for key, value in (sizes | own).items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    metadata = {"general.architecture": architecture, "tokenizer.ggml.tokens": ["a"] * 7} | keys
    return Store(metadata, tensors or {})


def read(architecture, tensors=None, **own):
    return read_config(store_of(architecture, tensors, **own))


@pytest.mark.parametrize(
    ("architecture", "hub"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("gemma", "GemmaForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM"),
    ],
)
def test_left_out_keys(architecture, hub):
    config = read(architecture)
    assert config.architecture == hub
    assert config.vocab_size == 7
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 8)
    assert {spec.scale for spec in config.layer_specs} == {8**-0.5}
    assert config.tied_embeddings
    assert config.qkv_bias is (architecture == "qwen2")
    assert config.qk_norm is (architecture in ("qwen3", "gemma3"))
    window = 4096 if architecture == "gemma2" else None
    assert config.windows == (window, None, window, None)


def test_sizes_of_its_own():
    keys = {"attention__head_count_kv": 2, "attention__key_length": 16}
    config = read("qwen3", {"output.weight": np.zeros(1)}, **keys, context_length=99)
    assert (config.num_kv_heads, config.head_dim, config.max_length) == (2, 16, 99)
    assert not config.tied_embeddings


@pytest.mark.parametrize(
    ("architecture", "keys", "windows"),
    [
        ("llama", {"attention__sliding_window": 5}, (5, 5, 5, 5)),
        ("llama", {"attention__sliding_window": 0}, (None,) * 4),
        ("gemma2", {"attention__sliding_window": 5}, (5, None, 5, None)),
        ("gemma3", {"attention__sliding_window": 5}, (5, 5, 5, 5, 5, None, 5)),
        (
            "gemma3",
            {"attention__sliding_window": 5, "attention__sliding_window_pattern": 2},
            (5, None, 5),
        ),
        (
            "gemma3",
            {
                "attention__sliding_window": 5,
                "attention__sliding_window_pattern": [True, False, False],
            },
            (5, None, None),
        ),
    ],
)
def test_windows(architecture, keys, windows):
    assert read(architecture, layers=len(windows), **keys).windows == windows


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, RopeConfig(theta=1e4)),
        ({"rope__freq_base": 5e5}, RopeConfig(theta=5e5)),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            RopeConfig(scaling=LinearScaling(factor=4.0)),
        ),
        ({"rope__scaling__factor": 4.0}, RopeConfig(scaling=LinearScaling(factor=4.0))),
        ({"rope__scale_linear": 4.0}, RopeConfig(scaling=LinearScaling(factor=4.0))),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, RopeConfig()),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, RopeConfig()),
    ],
)
def test_rope(keys, rope):
    assert read("llama", **keys).rope == rope


def test_rope_factors_divide_the_frequencies():
    factors = np.array([1, 2, 4, 8], np.float32)
    config = read("llama", {"rope_freqs.weight": factors})
    assert config.rope.scaling == FrequencyFactors(factors=(1.0, 2.0, 4.0, 8.0))
    plain = RopeConfig().frequencies(8)
    np.testing.assert_allclose(config.rope.frequencies(8), plain / factors, rtol=1e-7)


def test_gemma3_has_two_bases():
    config = read("gemma3", rope__freq_base=1e6, rope__freq_base_swa=2e4, rope__scaling__factor=8.0)
    assert config.rope == RopeConfig(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert config.local_rope == RopeConfig(theta=2e4)


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemma_27b_scales_by_hidden_size_over_heads(architecture, layers):
    keys = {"attention__head_count": 2, "attention__key_length": 4}
    for count, scalar in ((layers, 16), (layers - 1, 4)):
        (spec, *_) = read(architecture, layers=count, **keys).layer_specs
        assert spec.scale == scalar**-0.5


def test_soft_caps():
    config = read("gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=7.0)
    assert (config.attn_softcap, config.final_softcap) == (5.0, 7.0)
    assert read("gemma3", final_logit_softcapping=7.0).final_softcap == 7.0


def test_llama_with_biases():
    config = read("llama", {"blk.0.attn_q.bias": np.zeros(32)})
    assert config.qkv_bias
    assert config.out_bias


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        (
            "mamba",
            {},
            "architecture 'mamba' is not supported; supported are "
            "llama, qwen2, qwen3, gemma, gemma2, gemma3",
        ),
        ("llama", {"block_count": None}, "llama.block_count missing"),
        ("qwen2", {"attention__layer_norm_rms_epsilon": None}, "rms_epsilon missing"),
        ("llama", {"expert_count": 8}, "llama.expert_count is 8"),
        ("llama", {"attention__head_count_kv": 3}, "num_key_value_heads is 3"),
        ("llama", {"attention__head_count": 0}, "num_attention_heads is 0"),
        ("llama", {"feed_forward_length": [1, 2, 3, 4]}, "intermediate_size"),
        ("llama", {"rope__scaling__type": "yarn"}, "'yarn'"),
        ("qwen2", {"rope__dimension_count": 4}, "qwen2.rope.dimension_count is 4"),
        ("gemma", {"attention__value_length": 4}, "gemma.attention.value_length is 4"),
        ("qwen3", {"attention__sliding_window": 64}, "qwen3.attention.sliding_window is 64"),
        (
            "gemma3",
            {"attention__sliding_window": 4, "attention__sliding_window_pattern": [True]},
            "sliding_window",
        ),
    ],
)
def test_refused(architecture, keys, named):
    with pytest.raises(models.CheckpointError, match=named) as refusal:
        read(architecture, **keys)
    assert str(refusal.value).startswith("some.gguf: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("factors", "keys", "named"),
    [
        ([1.0, 2.0], {}, "number of rope factors is 2: must be 4"),
        ([1.0, 0.0, 1.0, 1.0], {}, "rope factor is 0.0"),
        ([1.0, np.nan, 1.0, 1.0], {}, "rope factor is nan"),
        ([1.0] * 4, {"rope__scaling__factor": 8.0}, "rope_freqs.weight beside another scaling"),
    ],
)
def test_refused_rope_factors(factors, keys, named):
    with pytest.raises(models.CheckpointError, match=named):
        read("llama", {"rope_freqs.weight": np.asarray(factors, np.float32)}, **keys)
