"""Tokenizers and chat templates against their golden ids and texts."""

import json

import pytest
from model_fixtures import FIXTURES

from models import gguf_tokenizer
from models.chat import ChatTemplate
from models.gguf_file import GGUFStore
from models.huggingface import read_tokenizer
from models.sources import resolve


def folders():
    found = sorted(path.parent for path in FIXTURES.glob("hf_tiny/*/tokenizer_goldens.json"))
    assert found, f"no hf_tiny/*/tokenizer_goldens.json in {FIXTURES}"
    return [pytest.param(folder, id=folder.name) for folder in found]


def goldens_of(folder):
    return json.loads((folder / "tokenizer_goldens.json").read_text(encoding="utf-8"))


def added_tokens(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return config["added_tokens_decoder"]


@pytest.mark.parametrize("folder", folders())
def test_fixtures_strings(folder):
    tokenizer = read_tokenizer(folder)
    not_special = [
        entry["content"] for entry in added_tokens(folder).values() if not entry["special"]
    ]
    for golden in goldens_of(folder)["strings"]:
        text = golden["text"]
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == golden["ids_plain"]
        assert tokenizer.encode(text, add_bos=False) == golden["ids"], text
        assert tokenizer.encode(text) == golden["ids_with_special"], text
        assert tokenizer.decode(golden["ids_plain"], skip_special=False) == golden["decoded"]
        decoded = tokenizer.decode(golden["ids_with_special"])
        for token in not_special:
            # Some references drop these along with the special ones; we keep what is text.
            if token not in golden["decoded_skip_special"]:
                decoded = decoded.replace(token, "")
        assert decoded == golden["decoded_skip_special"]


@pytest.mark.parametrize("folder", folders())
def test_fixtures_chats(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer.has_chat_template
    for chat in goldens_of(folder)["chats"]:
        text = tokenizer.apply_chat(
            chat["messages"],
            add_generation_prompt=chat["add_generation_prompt"],
            **chat["template_kwargs"],
        )
        assert text == chat["text"]
        assert tokenizer.encode(text, add_bos=False) == chat["ids"]


@pytest.mark.parametrize("folder", folders())
def test_fixtures_chats_that_must_raise(folder):
    tokenizer = read_tokenizer(folder)
    for chat in goldens_of(folder)["chats_must_raise"]:
        with pytest.raises(ValueError, match="chat template") as refusal:
            tokenizer.apply_chat(chat["messages"])
        assert chat["template_says"] in str(refusal.value)


@pytest.mark.parametrize("folder", folders())
def test_fixtures_special_ids(folder):
    tokenizer = read_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    by_content = {entry["content"]: int(i) for i, entry in added_tokens(folder).items()}

    def wanted(key):
        token = config.get(key)
        return by_content.get(token["content"] if isinstance(token, dict) else token)

    assert tokenizer.bos_id == wanted("bos_token")
    assert tokenizer.eos_ids == (wanted("eos_token"),)
    assert tokenizer.pad_id == wanted("pad_token")
    assert tokenizer.vocab_size > max(by_content.values())
    for token_id in by_content.values():
        text = tokenizer.decode([token_id], skip_special=False)
        assert tokenizer.encode(text, add_bos=False) == [token_id]


def test_fixtures_gguf_strings():
    """The byte-level BPE that a GGUF file of the SmolLM family carries."""
    tokenizer = gguf_tokenizer.read_tokenizer(GGUFStore(resolve("smollm2-135m-instruct")))
    goldens = goldens_of(FIXTURES / "smollm2")
    for text, ids in zip(goldens["strings"], goldens["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.turn_end_ids == tokenizer.eos_ids
    chat = tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_fixtures_gemma_gguf_strings():
    """The sentencepiece BPE that is rebuilt from a GGUF file's scores."""
    tokenizer = gguf_tokenizer.read_tokenizer(GGUFStore(resolve("gemma-3-270m")))
    goldens = goldens_of(FIXTURES / "gemma3")
    for text, ids in zip(goldens["strings"], goldens["ids"], strict=True):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text.replace("\u2581", " ")
    assert tokenizer.encode("<bos>x<eos>", add_bos=False) == [2, *tokenizer.encode("x")[1:], 1]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert tokenizer.encode("<end_of_turn>") == [2, *tokenizer.turn_end_ids]


def test_template_runs_in_a_sandbox():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(ValueError, match="chat template"):
        template.render([])


def test_template_json_is_not_escaped_for_html():
    template = ChatTemplate("{{ tools | tojson }}", {})
    assert template.render([], tools=[{"a": "<ü>"}]) == '[{"a": "<ü>"}]'


def test_template_blocks_leave_no_whitespace():
    template = ChatTemplate("  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n", {})
    assert template.render([{"role": "user", "content": "hi"}]) == "  hi\n"


def test_template_that_is_not_jinja():
    with pytest.raises(ValueError, match="not valid"):
        ChatTemplate("{% if %}", {})


def test_no_template(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        read_tokenizer(tmp_path).apply_chat([])
