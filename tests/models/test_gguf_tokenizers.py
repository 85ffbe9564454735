"""Tokenizers out of GGUF metadata: pre-tokenizers by hand-cut words, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

import models
from models.gguf_tokenizer import read_tokenizer


@dataclasses.dataclass
class Store:
    metadata: dict
    path: Path = Path("some.gguf")


def store_of(kind, **changes):
    keys = {"model": kind, **changes}
    keys = {key: value for key, value in keys.items() if value is not None}
    return Store({f"tokenizer.ggml.{key}": value for key, value in keys.items()})


def byte_level(pre, words=(), **changes):
    """A vocabulary of the bytes and of `words`, each reached by merges from the left."""
    tokens, merges = ["<s>", "</s>", *sorted(ByteLevel.alphabet())], []
    for word in words:
        written = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        for end in range(2, len(written) + 1):
            if written[:end] not in tokens:
                tokens.append(written[:end])
                merges.append(f"{written[: end - 1]} {written[end - 1]}")
    types = [3, 3, *[1] * (len(tokens) - 2)]
    base = {
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return store_of("gpt2", **(base | changes))


TEXT = "It's 2024!\n/\n I'LL go\n\n  on, camelCase"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "It|'s| 2024|!|\n|/|\n| I|'|LL| go|\n\n | on|,| camelCase"),
        ("smollm", "It|'s| |2|0|2|4|!|\n|/|\n| I|'|LL| go|\n\n | on|,| camelCase"),
        ("llama-bpe", "It|'s| |202|4|!\n|/\n| I|'LL| go|\n\n| | on|,| camelCase"),
        ("qwen2", "It|'s| |2|0|2|4|!\n|/\n| I|'LL| go|\n\n| | on|,| camelCase"),
        ("tekken", "It|'s| |2|0|2|4|!\n/\n| I|'LL| go|\n\n| | on|,| camel|Case"),
    ],
)
def test_words(pre, words):
    """The text in words, cut by hand after the expressions of the models' own tokenizers."""
    words = words.split("|")
    tokenizer = read_tokenizer(byte_level(pre, words))
    ids = tokenizer.encode(TEXT, add_bos=False)
    assert [tokenizer.decode([i]) for i in ids] == words


def test_other_names_of_llama_bpe():
    ids = [read_tokenizer(byte_level(pre)).encode(TEXT) for pre in ("llama-bpe", "llama3")]
    assert ids[0] == ids[1] == read_tokenizer(byte_level("llama-v3")).encode(TEXT)


@pytest.mark.parametrize(
    ("pre", "whole_words"),
    [("gpt-2", False), ("smollm", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True)],
)
def test_words_that_no_merge_reaches(pre, whole_words):
    store = byte_level(pre, ["word"], merges=[])
    assert (len(read_tokenizer(store).encode("word", add_bos=False)) == 1) is whole_words


@pytest.mark.parametrize("pre", ["qwen2", "gpt-2"])
def test_only_qwen_composes_characters(pre):
    tokenizer = read_tokenizer(byte_level(pre))
    composed, apart = (tokenizer.encode(text) for text in ("\u00e9", "e\u0301"))
    assert (composed == apart) is (pre == "qwen2")


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("gpt-2", None, False),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ],
)
def test_byte_level_bos(pre, said, adds):
    ids = read_tokenizer(byte_level(pre, add_bos_token=said)).encode("a")
    assert (ids[0] == 0) is adds
    assert len(ids) == 1 + adds


def test_special_strings_are_text_on_request():
    tokenizer = read_tokenizer(byte_level("qwen2", token_type=[3, 4, *[1] * 256]))
    assert tokenizer.encode("<s></s>") == [0, 1]
    assert tokenizer.decode([0, 1]) == "</s>"  # user-defined: text, though matched whole
    assert len(tokenizer.encode("<s>", parse_special=False)) == 3


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "\u2581a"]
KINDS = [2, 3, 3, *[6] * 256, 1, 1, 1]


def sentencepiece(**changes):
    base = {
        "tokens": PIECES,
        "token_type": KINDS,
        "scores": [0.0] * 259 + [-2.0, -3.0, -1.0],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return store_of("llama", **(base | changes))


@pytest.mark.parametrize(
    ("changes", "text", "ids"),
    [
        ({}, "a", [1, 261]),  # a dummy prefix and a BOS where the file does not say
        ({"add_bos_token": False}, "a", [261]),
        ({"add_space_prefix": False}, "a", [1, 260]),
        ({}, "a  a", [1, 261, 259, 261]),  # spaces are kept
        ({}, "a</s>a", [1, 261, 2, 261]),  # the prefix again after a special token
        ({}, "\u00e9", [1, 259, 3 + 0xC3, 3 + 0xA9]),  # bytes of what is no piece
        ({"unknown_token_id": None}, "a", [1, 261]),
        ({"token_type": [3, *KINDS[1:]]}, "a", [1, 261]),  # as converters list the unknown piece
        ({"pre": "default"}, "a", [1, 261]),
    ],
)
def test_sentencepiece(changes, text, ids):
    tokenizer = read_tokenizer(sentencepiece(**changes))
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special=False).removeprefix("<s>") == text


@pytest.mark.parametrize(
    ("store", "named"),
    [
        (byte_level("gemma4"), "'gpt2' with pre-tokenizer 'gemma4' is not supported"),
        (byte_level("gemma4"), "'gpt2' with gpt-2, smollm, llama-bpe, llama3, llama-v3, qwen2, te"),
        (byte_level(None), "pre-tokenizer None"),
        (store_of("t5"), "tokenizer 't5'"),
        (store_of(None), "tokenizer None"),
        (byte_level("qwen2", merges=None), r"tokenizer\.ggml\.merges missing"),
        (byte_level("qwen2", token_type=[1]), "1 token types for 258 tokens"),
        (byte_level("qwen2", bos_token_id=999), "bos_token_id is 999, of 258 tokens"),
        (sentencepiece(scores=None), r"tokenizer\.ggml\.scores missing"),
        (sentencepiece(scores=[0.0]), "tokenizer: "),
        (sentencepiece(unknown_token_id=None, token_type=[1] * 262), "unknown_token_id missing"),
    ],
)
def test_refused(store, named):
    with pytest.raises(models.CheckpointError, match=named) as refusal:
        read_tokenizer(store)
    assert str(refusal.value).startswith("some.gguf: ")
    assert "\n" not in str(refusal.value)
