"""Decoding while ids arrive: the pieces add up to the whole, and none ends within a character."""

import functools
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import FIXTURES
from test_gguf_tokenizers import sentencepiece
from tokenizers import decoders, pre_tokenizers

from models.gguf_tokenizer import read_tokenizer as read_gguf_tokenizer
from models.huggingface import read_tokenizer
from models.tokenizer import Tokenizer
from models.tokenizer_backends import MissingBackend, TokenizersBackend

FOLDERS = sorted(path.parent for path in FIXTURES.glob("hf_tiny/*/tokenizer_goldens.json"))


def byte_fallback():
    """A tokenizer.json as Llama's and Gemma's are on the hub: pieces, then bytes."""
    specials = ["<s>", "</s>"]
    pieces = ["<unk>", *specials, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc,", "▁a", "é"]
    pipeline = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pipeline.add_special_tokens(specials)
    return Tokenizer(backend=TokenizersBackend(pipeline), bos_id=1)


KINDS = {folder.name: functools.partial(read_tokenizer, folder) for folder in FOLDERS} | {
    "tokenizer.json with byte fallback": byte_fallback,
    "sentencepiece out of GGUF": lambda: read_gguf_tokenizer(sentencepiece()),
    "without a dummy prefix": lambda: read_gguf_tokenizer(sentencepiece(add_space_prefix=False)),
}
TEXTS = st.text() | st.text("aé 日🙂\u0301\u200d\n", max_size=300) | st.text("🙂👩‍🚀�", max_size=40)


@functools.cache
def tokenizer_of(kind):
    return KINDS[kind]()


def pieces_of(tokenizer, ids, seed, *, skip_special):
    """Pieces of a stream that gets from none to a few ids at a time; the last is of the end."""
    rng, stream, pieces, at = (
        random.Random(seed),
        tokenizer.stream(skip_special=skip_special),
        [],
        0,
    )
    while at < len(ids):
        count = rng.choice((0, 1, 1, 1, 2, 5))
        pieces.append(stream.push(ids[at : at + count]))
        at += count
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(text=TEXTS, seed=st.integers(0, 9), skip_special=st.booleans())
def test_text(kind, text, seed, skip_special):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special=skip_special)
    pieces = pieces_of(tokenizer, ids, seed, skip_special=skip_special)
    assert "".join(pieces) == whole
    if "�" not in whole:
        assert not any("�" in piece for piece in pieces)
        # All is out before the end, but where a run of bytes is text or not as a whole.
        assert pieces[-1] == "" or kind == "tokenizer.json with byte fallback"


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 9), skip_special=st.booleans())
def test_any_ids(kind, data, seed, skip_special):
    """Also those that no text is encoded to: bytes in any order, special tokens in between."""
    tokenizer = tokenizer_of(kind)
    one_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(one_id, max_size=200) | st.lists(st.integers(0, 9), max_size=200))
    whole = tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(pieces_of(tokenizer, ids, seed, skip_special=skip_special)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_characters_come_out_as_they_end(kind):
    tokenizer = tokenizer_of(kind)
    text = "a 日本 🙂🙂 a, " * 20
    stream, seen = tokenizer.stream(), ""
    ids = tokenizer.encode(text)
    for at, token_id in enumerate(ids):
        seen += stream.push([token_id])
        settled = tokenizer.decode(ids[: at + 1]).rstrip("�")
        assert settled.startswith(seen)
        if kind != "tokenizer.json with byte fallback":
            assert seen == settled
    assert seen + stream.finish() == tokenizer.decode(ids)


def test_bytes_that_are_no_text_hold_back_what_they_follow():
    """This kind decodes a run of bytes to text only if all of it is text."""
    tokenizer = byte_fallback()
    smile = [3 + byte for byte in "🙂".encode()]
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in smile] == [""] * 4
    assert stream.push([260]) == "🙂a"
    assert stream.push([*smile, 3 + 0xFF, 1]) == ""
    assert stream.push([260]) == "�����a"
    assert stream.finish() == ""


def test_work_does_not_grow_with_the_text():
    class Counting(TokenizersBackend):
        decoded = 0

        def decode(self, ids, *, skip_special):
            self.decoded += len(ids)
            return super().decode(ids, skip_special=skip_special)

    backend = Counting(byte_fallback().backend._pipeline)
    stream = Tokenizer(backend=backend).stream()
    for _ in range(1000):
        stream.push([260, 259])
    assert backend.decoded < 100 * 1000
    assert stream.finish() == ""


@pytest.mark.parametrize("make", [byte_fallback, lambda: read_gguf_tokenizer(sentencepiece())])
def test_many_special_tokens_do_not_make_the_next_one_the_first(make):
    """Only the first token of a text loses its space, however much was forgotten since."""
    tokenizer = make()
    space_a = tokenizer.encode("a a", add_bos=False)[-1]
    ids = [space_a] * 80 + [1] * 80 + [space_a]
    stream = tokenizer.stream()
    assert "".join(stream.push([i]) for i in ids) == tokenizer.decode(ids) == "a" + " a" * 80


def test_stream_starts_anew_after_its_end():
    stream = byte_fallback().stream()
    for _ in range(2):
        assert stream.push([264]) + stream.finish() == "a"  # a leading space is the first's alone


def test_without_a_tokenizer():
    backend = MissingBackend(Path("some/folder"))
    with pytest.raises(ValueError, match=r"some/folder: no tokenizer\.json"):
        Tokenizer(backend=backend).stream().push([1])
