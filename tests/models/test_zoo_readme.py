"""What models/README.md says is so: its tables, and that its page suffices to add a model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from dense_attend import dense_logits
from safetensors.numpy import save_file

import models
from models import families, gguf_model, gguf_tokenizer, registry
from models.families import FAMILIES, TEXT_PARTS, Family
from models.names import hf_source
from models.weights import named_parameters

PACKAGE = Path(models.__file__).parent
README = (PACKAGE / "README.md").read_text()


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_architectures():
    assert re.findall(r"^\| `(\w+For\w+)`", README, re.MULTILINE) == list(FAMILIES)
    assert all(f"`{name}`" in README for name in TEXT_PARTS)


def test_gguf():
    (about,) = re.findall(r"^GGUF files load.*?\n\n", README, re.MULTILINE | re.DOTALL)
    known = {*gguf_model._ARCHITECTURES, *gguf_tokenizer._PRE_TOKENIZERS}
    assert set(re.findall(r"`([\w-]+)`", about)) - {"gguf", "query_pre_attn_scalar"} == known


def test_map_lists_every_file():
    named = re.findall(r"`(\w+\.py)`", section("Map"))
    assert sorted(named) == sorted(
        path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"
    )


def test_files_of_the_page_exist():
    for name in re.findall(r"`([\w/]+\.py)`", section("How to add a model")):
        root = PACKAGE if "/" not in name else PACKAGE.parent
        assert (root / name).is_file(), name


@pytest.mark.parametrize("biased", [False, True])
def test_a_family_that_differs_by_configuration_needs_two_entries(tmp_path, monkeypatch, biased):
    """Step 1 and the last sentence of step 2; step 3 has nothing to add."""
    monkeypatch.setitem(families.FAMILIES, "ToyForCausalLM", Family(qk_norm=True, qkv_bias=biased))
    monkeypatch.setitem(registry.NETWORKS, "ToyForCausalLM", models.Llama)
    hf = {
        "architectures": ["ToyForCausalLM"],
        "vocab_size": 32,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = models.ModelConfig.from_hf(hf)
    model = models.Llama.init(config, seed=2)
    tensors = {}
    for path, value in named_parameters(model).items():
        source = hf_source(path, config)
        value = np.asarray(value)
        tensors[source.name] = np.ascontiguousarray(value.T if source.transposed else value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    lm = models.load(tmp_path)
    assert lm.config.qk_norm
    assert lm.config.qkv_bias is biased
    ids = np.arange(9)[None]
    np.testing.assert_array_equal(dense_logits(lm.model, ids, ids), dense_logits(model, ids, ids))
