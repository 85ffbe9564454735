"""GGUF files of every architecture, against the golden values of the hub checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from gguf_checkpoint import write_checkpoint
from model_fixtures import FIXTURES, checkpoints
from sentencepiece import sentencepiece_model_pb2

import models
from models import convert
from models.weights import named_parameters

LOGITS_MAX, LOGITS_MEAN = 5e-4, 5e-5  # as for the hub checkpoints themselves


@pytest.fixture(scope="module", params=checkpoints("hf_tiny/*", wants="goldens.npz"))
def case(request, tmp_path_factory):
    """A folder of the fixtures, its GGUF file, and what is loaded from both."""
    folder = request.param
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_checkpoint(folder, path)
    return folder, path, models.load(path), models.load(folder)


def test_fixtures_logits(case):
    folder, _, lm, _ = case
    with np.load(folder / "goldens.npz") as goldens:
        for ids, logits in (("input_ids", "logits"), ("long_ids", "long_logits")):
            if ids in goldens:
                tokens = jnp.atleast_2d(goldens[ids])
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
                got = dense_logits(lm.model, tokens, positions)
                difference = np.abs(got - goldens[logits].reshape(got.shape))
                assert difference.max() <= LOGITS_MAX
                assert difference.mean() <= LOGITS_MEAN


def test_fixtures_layers_are_those_of_the_hub_checkpoint(case):
    _, _, lm, hub = case
    assert [spec.window for spec in lm.model.layer_specs] == [
        spec.window for spec in hub.model.layer_specs
    ]
    for field in ("num_heads", "num_kv_heads", "head_dim", "softcap"):
        assert [getattr(spec, field) for spec in lm.model.layer_specs] == [
            getattr(spec, field) for spec in hub.model.layer_specs
        ]
    assert lm.config.max_length == hub.config.max_length
    assert lm.config.vocab_size == hub.config.vocab_size


def test_fixtures_strings(case):
    """Ids of the golden strings, as far as a GGUF file can hold what they hang on."""
    folder, _, lm, _ = case
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = [entry["content"] for entry in config["added_tokens_decoder"].values()]
    compared = 0
    for golden in json.loads((folder / "tokenizer_goldens.json").read_text())["strings"]:
        text = golden["text"]
        assert lm.tokenizer.decode(golden["ids_plain"], skip_special=False) == golden["decoded"]
        if _is_unigram(folder):  # a file holds merge ranks; these scores are log-probabilities
            continue
        plain = not any(token in text for token in added)
        if plain:  # a file does not tell control pieces from user-defined ones that are special
            ids = lm.tokenizer.encode(text, add_bos=False, parse_special=False)
            assert ids == golden["ids_plain"], text
        # Nor `legacy: false`: text after a special token always gets the dummy prefix.
        if plain or config.get("legacy", True):
            assert lm.tokenizer.encode(text, add_bos=False) == golden["ids"], text
            assert lm.tokenizer.encode(text) == golden["ids_with_special"], text
            compared += 1
    assert _is_unigram(folder) or compared >= 30


def test_fixtures_chats(case):
    folder, _, lm, hub = case
    for chat in json.loads((folder / "tokenizer_goldens.json").read_text())["chats"]:
        text = lm.tokenizer.apply_chat(
            chat["messages"],
            add_generation_prompt=chat["add_generation_prompt"],
            **chat["template_kwargs"],
        )
        assert text == chat["text"]
    assert lm.tokenizer.bos_id == hub.tokenizer.bos_id
    assert lm.tokenizer.eos_ids == hub.tokenizer.eos_ids
    assert lm.tokenizer.pad_id == hub.tokenizer.pad_id
    assert lm.turn_end_ids == hub.turn_end_ids


def test_fixtures_become_hub_files(case, tmp_path):
    _, path, lm, _ = case
    convert.convert(path, tmp_path / "out")
    after = models.load(tmp_path / "out")
    assert after.config == lm.config
    before = named_parameters(lm.model)
    for name, value in named_parameters(after.model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    text = "Some text, 123.\n  naïve 東京"
    assert after.tokenizer.encode(text) == lm.tokenizer.encode(text)


def test_fixtures_llama_with_biases(tmp_path):
    """Those of q and k take turns like the rows of their weights; no fixture has a tokenizer."""
    folder = FIXTURES / "hf_tiny/quirks/llama_attention_bias"
    write_checkpoint(folder, tmp_path / "model.gguf")
    lm = models.load(tmp_path / "model.gguf")
    with np.load(folder / "expected.npz") as expected:
        tokens = expected["input_ids"][None]
        logits = dense_logits(lm.model, tokens, np.arange(tokens.shape[1])[None])[0]
        difference = np.abs(logits - expected["logits"])
    assert difference.max() <= LOGITS_MAX
    assert difference.mean() <= LOGITS_MEAN


def _is_unigram(folder):
    if not (folder / "tokenizer.model").exists():
        return False
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    return proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
