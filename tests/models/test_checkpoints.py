"""Odd checkpoints load, bad ones are refused, whatever their layout."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from model_fixtures import FIXTURES, checkpoints
from safetensors.numpy import load_file, save_file

import models
from models.weights import all_finite


def logits_of(lm, ids):
    ids = jnp.asarray(ids)[None]
    return dense_logits(lm.model, ids, jnp.arange(ids.shape[1])[None])[0]


@pytest.mark.parametrize("folder", checkpoints("hf_tiny/quirks/*", wants="expected.npz"))
def test_fixtures_quirk_loads(folder):
    lm = models.load(folder)
    with np.load(folder / "expected.npz") as expected:
        difference = np.abs(logits_of(lm, expected["input_ids"]) - expected["logits"])
    assert difference.max() <= 5e-4
    assert difference.mean() <= 5e-5


def broken():
    manifest = json.loads((FIXTURES / "hf_tiny/broken/manifest.json").read_text())
    return [pytest.param(name, about, id=name) for name, about in sorted(manifest.items())]


@pytest.mark.parametrize(("name", "about"), broken())
def test_fixtures_broken_is_refused(name, about):
    folder = FIXTURES / "hf_tiny/broken" / name
    with pytest.raises(models.CheckpointError) as refusal:
        models.load(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for wanted in named_things(about["message_should_name"], folder):
        assert wanted in message


def named_things(text, folder):
    """What the manifest wants to see in the message, as strings to look for."""
    if text == "the architecture":
        return json.loads((folder / "config.json").read_text())["architectures"]
    if text == "the index":
        return ["model.safetensors.index.json"]
    if text == "the path":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        return [file for file in set(index["weight_map"].values()) if "/" in file]
    if text.startswith("the file"):
        return ["model.safetensors"]
    return text.split(" / ")


@pytest.fixture
def plain(tmp_path):
    """A small healthy checkpoint to spoil."""
    config = models.ModelConfig.from_hf(HF_CONFIG)
    model = models.Llama.init(config)
    tensors = {
        "model.embed_tokens.weight": model.embed[...],
        "model.norm.weight": model.norm.w[...],
        "lm_head.weight": model.head.w[...].T,
    }
    for i, block in enumerate(model.layers):
        at = f"model.layers.{i}"
        tensors |= {
            f"{at}.input_layernorm.weight": block.attn_norm.w[...],
            f"{at}.post_attention_layernorm.weight": block.mlp_norm.w[...],
        }
        for name in "qkvo":
            tensors[f"{at}.self_attn.{name}_proj.weight"] = getattr(block.attn, name).w[...].T
        for name in ("gate", "up", "down"):
            tensors[f"{at}.mlp.{name}_proj.weight"] = getattr(block.mlp, name).w[...].T
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}


def test_saved_model_loads_to_the_same_logits(plain):
    lm = models.load(plain)
    ids = np.arange(7)
    wanted = models.Llama.init(lm.config)
    got = dense_logits(lm.model, ids[None], ids[None])
    np.testing.assert_array_equal(got, dense_logits(wanted, ids[None], ids[None]))
    assert lm.name == str(plain)
    assert lm.eos_ids == ()
    assert lm.turn_end_ids == ()


def test_sharded_equals_single(plain, tmp_path_factory):
    sharded = tmp_path_factory.mktemp("sharded")
    (sharded / "config.json").write_text((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = np.arange(9)
    np.testing.assert_array_equal(
        logits_of(models.load(plain), ids), logits_of(models.load(sharded), ids)
    )


def test_all_problems_are_reported_together(plain):
    path = plain / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    tensors["stray"] = np.ones(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(models.CheckpointError) as refusal:
        models.load(plain)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "stray"):
        assert name in str(refusal.value)


def test_tied_head_that_differs_is_refused(plain):
    (plain / "config.json").write_text(json.dumps(HF_CONFIG | {"tie_word_embeddings": True}))
    with pytest.raises(models.CheckpointError, match=r"lm_head\.weight differs"):
        models.load(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_is_of_every_element(dtype, bad):
    largest = jnp.finfo(dtype).max
    x = jnp.full((3, 70), largest, dtype).at[1].set(-largest).at[2].set(0)
    assert all_finite(x)
    for place in ((0, 0), (1, 35), (2, 69)):
        assert not all_finite(x.at[place].set(bad))


def test_integer_tensor_is_refused(plain):
    path = plain / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int32)}, path)
    with pytest.raises(models.CheckpointError, match=r"model\.norm\.weight has dtype I32"):
        models.load(plain)


def test_bad_eos_is_refused(plain):
    (plain / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(models.CheckpointError, match=r"generation_config\.json: eos_token_id"):
        models.load(plain)


def test_eos_of_both_files(plain):
    (plain / "config.json").write_text(json.dumps(HF_CONFIG | {"eos_token_id": 2}))
    (plain / "generation_config.json").write_text('{"eos_token_id": [3, 2]}')
    assert models.load(plain).eos_ids == (2, 3)


def test_model_without_tokenizer_says_so_when_used(plain):
    tokenizer = models.load(plain).tokenizer
    with pytest.raises(models.CheckpointError, match=re.escape("no tokenizer.json")):
        tokenizer.encode("text")
    with pytest.raises(models.CheckpointError, match=re.escape("no tokenizer.json")):
        tokenizer.decode([1])


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype is 'int4': must be one of float32, bfloat16, int8"):
        models.load("anything", dtype="int4")
