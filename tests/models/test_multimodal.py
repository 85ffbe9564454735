"""The language model of a checkpoint of text and images: the same as the text model alone."""

import json

import numpy as np
import pytest
from dense_attend import dense_logits
from real_configs import REAL
from safetensors.numpy import save_file

import models
from models import convert
from models.names import hf_source
from models.weights import named_parameters

TEXT = {
    "vocab_size": 48,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
}
VISION = ["vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.w"]
IDS = np.arange(12)[None] % 48


def old_name(name):
    return f"language_model.{name}"


def new_name(name):
    return name if name == "lm_head.weight" else f"model.language_model.{name[len('model.') :]}"


def write(folder, *, style, tied=True, extra=(), **config):
    """Writes one random model; `style` renames the tensors, None leaves out text and images."""
    folder.mkdir()
    text = TEXT | {"tie_word_embeddings": tied}
    plain = models.ModelConfig.from_hf({"architectures": ["Gemma3ForCausalLM"]} | text)
    tensors = {}
    for path, value in named_parameters(models.Gemma.init(plain, seed=5)).items():
        source = hf_source(path, plain)
        value = np.asarray(value)
        tensors[source.name] = np.ascontiguousarray(value.T if source.transposed else value)
    hf = {"architectures": ["Gemma3ForCausalLM"]} | text
    if style is not None:
        tensors = {style(name): tensor for name, tensor in tensors.items()}
        eye = "model." if style is new_name else ""
        tensors |= {eye + name: np.ones((2, 3), np.float32) for name in VISION}
        hf = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text,
            "vision_config": {"hidden_size": 3},
            "eos_token_id": [1, 6],
        }
    tensors |= {name: np.ones(1, np.float32) for name in extra}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf | config))
    return folder


def logits_of(lm):
    return dense_logits(lm.model, IDS, np.arange(IDS.shape[1])[None])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("style", [old_name, new_name])
def test_language_model_is_the_text_model(tmp_path, caplog, style, tied):
    plain = models.load(write(tmp_path / "plain", style=None, tied=tied))
    assert caplog.messages == []
    both = models.load(write(tmp_path / "both", style=style, tied=tied))
    np.testing.assert_array_equal(logits_of(both), logits_of(plain))
    assert both.config == plain.config
    assert both.config.architecture == "Gemma3ForCausalLM"
    assert both.eos_ids == (1, 6)
    (message,) = caplog.messages
    assert "2 tensors of the vision tower and its projector are left out" in message
    assert str(tmp_path / "both") in message


def test_converted_is_the_text_model(tmp_path):
    folder = write(tmp_path / "both", style=new_name)
    convert.convert(folder, tmp_path / "out")
    np.testing.assert_array_equal(
        logits_of(models.load(tmp_path / "out")), logits_of(models.load(folder))
    )


@pytest.mark.parametrize(
    ("style", "extra"),
    [
        (old_name, "audio_tower.w"),
        (new_name, "model.audio_tower.w"),
        (old_name, "language_model.model.layers.7.mlp.up_proj.weight"),
        (new_name, "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_other_tensors_are_left_over(tmp_path, style, extra):
    folder = write(tmp_path / "both", style=style, extra=[extra])
    with pytest.raises(models.CheckpointError, match="left over") as refusal:
        models.load(folder)
    assert extra in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"text_config": None}, "text_config is None"),
        ({"text_config": {}}, "num_hidden_layers, hidden_size, intermediate_size missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_refused_configs(tmp_path, config, named):
    folder = write(tmp_path / "both", style=old_name, **config)
    with pytest.raises(models.CheckpointError, match=named):
        models.load(folder)


def test_left_out_keys_of_the_published_4b_model():
    """Its text_config says no more than this."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config = models.ModelConfig.from_hf(hf)
    full, _ = REAL["gemma-3-4b"]
    assert config == models.ModelConfig.from_hf(full | {"max_position_embeddings": None})
