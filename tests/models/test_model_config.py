"""What `config.json` may and may not say."""

import pytest

from models import ModelConfig
from models.families import FAMILIES
from models.registry import NETWORKS
from models.rope import FrequencyFactors, LinearScaling, Llama3Scaling, RopeConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1, 1.5, 2.0, 4.0],
    "long_factor": [1, 1.5, 2.0, 4.0],
    "attention_factor": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(**changes):
    return ModelConfig.from_hf(BASE | changes)


def of(architecture, **changes):
    return read(architectures=[architecture], **changes)


def test_defaults_of_left_out_keys():
    config = read()
    assert config.num_kv_heads == 4
    assert config.head_dim == 8
    assert config.rms_eps == 1e-6
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.windows == (None, None, None)
    assert not any((config.tied_embeddings, config.qkv_bias, config.out_bias, config.qk_norm))


def test_layer_specs():
    (first, *_) = of("MistralForCausalLM", num_key_value_heads=2, sliding_window=5).layer_specs
    assert (first.num_heads, first.num_kv_heads, first.head_dim) == (4, 2, 8)
    assert (first.scale, first.softcap, first.window) == (8**-0.5, None, 5)


@pytest.mark.parametrize(
    ("architecture", "changes", "qkv_bias", "out_bias", "qk_norm"),
    [
        ("LlamaForCausalLM", {}, False, False, False),
        ("LlamaForCausalLM", {"attention_bias": True}, True, True, False),
        ("MistralForCausalLM", {}, False, False, False),
        ("Qwen2ForCausalLM", {}, True, False, False),
        ("Qwen3ForCausalLM", {}, False, False, True),
        ("Qwen3ForCausalLM", {"attention_bias": True}, True, True, True),
    ],
)
def test_family_arithmetic(architecture, changes, qkv_bias, out_bias, qk_norm):
    config = of(architecture, **changes)
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == (qkv_bias, out_bias, qk_norm)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 8}, (8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 8),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
        ("GemmaForCausalLM", {"sliding_window": 8}, (None, None, None)),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, (8, None, 8)),
        ("Gemma2ForCausalLM", {}, (4096, None, 4096)),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, None)),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "_sliding_window_pattern": 2}, (8, None, 8)),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 8, None, 8),
        ),
    ],
)
def test_windows(architecture, changes, windows):
    config = of(architecture, num_hidden_layers=len(windows), **changes)
    assert config.windows == windows


def test_gemma_defaults_of_left_out_keys():
    first, second, third = (of(f"Gemma{n}ForCausalLM") for n in ("", 2, 3))
    for config in (first, second, third):
        assert config.head_dim == 256
        assert config.tied_embeddings
        assert config.unit_offset
        assert config.scaled_embeddings
        assert config.activation == "gelu_tanh"
        assert {spec.scale for spec in config.layer_specs} == {256**-0.5}
    assert (first.post_norms, second.post_norms, third.post_norms) == (False, True, True)
    assert (second.attn_softcap, second.final_softcap) == (50.0, 30.0)
    assert (third.attn_softcap, third.final_softcap) == (None, None)
    assert (second.rope, second.local_rope) == (RopeConfig(theta=1e4), None)
    assert (third.rope, third.local_rope) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))


def test_gemma_scales_and_caps():
    config = of(
        "Gemma2ForCausalLM",
        query_pre_attn_scalar=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=7,
    )
    assert {(spec.scale, spec.softcap) for spec in config.layer_specs} == {(0.25, None)}
    assert config.final_softcap == 7.0


def test_gemma3_scaling_is_of_global_layers():
    config = of("Gemma3ForCausalLM", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert config.rope == RopeConfig(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert config.local_rope == RopeConfig(theta=1e4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"query_pre_attn_scalar": "many"}, "query_pre_attn_scalar"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": True}, "final_logit_softcapping"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"rope_local_base_freq": 0}, "rope_theta"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_gemma_refused(changes, named):
    with pytest.raises(ValueError, match=named) as refusal:
        of("Gemma3ForCausalLM", **changes)
    assert "\n" not in str(refusal.value)


def test_every_architecture_has_a_network():
    assert set(FAMILIES) == set(NETWORKS)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_scaling": None, "rope_theta": 500000}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, RopeConfig(theta=7.0)),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            RopeConfig(scaling=LinearScaling(factor=4.0)),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            RopeConfig(
                theta=5e5,
                scaling=Llama3Scaling(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
                ),
            ),
        ),
        (
            {"rope_scaling": LONGROPE},
            RopeConfig(scaling=FrequencyFactors(factors=(1.0, 1.5, 2.0, 4.0))),
        ),
    ],
)
def test_rope(changes, rope):
    assert read(**changes).rope == rope


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["LlamaForCausalLM", "x"]}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "spiral"}}, "spiral"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 4}}, "short_factor"),
        ({"rope_scaling": LONGROPE | {"attention_factor": 1.2}}, "attention_factor is 1.2"),
        ({"rope_scaling": LONGROPE | {"attention_factor": None}}, "attention_factor missing"),
        ({"rope_scaling": LONGROPE, "head_dim": 16}, "number of rope factors is 4: must be 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention", "chunked_attention", "full_attention"],
            },
            "chunked_attention",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "sliding_window",
        ),
    ],
)
def test_refused(changes, named):
    with pytest.raises(ValueError, match=named) as refusal:
        read(**changes)
    assert "\n" not in str(refusal.value)


def test_config_is_hashable():
    assert hash(read()) == hash(read())
