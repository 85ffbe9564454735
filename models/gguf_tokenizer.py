"""Rebuilds the tokenizer of a GGUF file from its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from models.chat import ChatTemplate
from models.errors import CheckpointError
from models.gguf_file import GGUFStore
from models.sentencepiece_proto import UNKNOWN, USER_DEFINED, encode_bpe
from models.tokenizer import Tokenizer
from models.tokenizer_backends import Backend, SentencePieceBackend, TokenizersBackend

_PREFIX = "tokenizer.ggml"
_CONTROL = 3  # of `token_type`, which has the numbers of sentencepiece
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """What a byte-level BPE does before it merges, under a name that GGUF files give it.

    Attributes:
        words: the regular expression that cuts a text into words; None for GPT-2's.
        single_digits: every digit is cut off before that.
        composed: the text is brought into Unicode's form NFC first.
        whole_words: a word that is a token is that token, whatever the merges say.
        add_bos: what holds where the file does not say.
    """

    words: str | None = None
    single_digits: bool = False
    composed: bool = False
    whole_words: bool = False
    add_bos: bool = False


# The expressions are those of the tokenizer.json files of the models that the names stand for.
_AFTER_LETTERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _PreTokenizer(
    words=rf"{_LETTERS}|\p{{N}}{{1,3}}{_AFTER_LETTERS}", whole_words=True, add_bos=True
)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _PreTokenizer(words=rf"{_LETTERS}|\p{{N}}{_AFTER_LETTERS}", composed=True),
    "tekken": _PreTokenizer(words=_TEKKEN, whole_words=True, add_bos=True),
}


def read_tokenizer(store: GGUFStore) -> Tokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Raises:
        CheckpointError: it is neither a byte-level BPE with a known pre-tokenizer nor a
            sentencepiece BPE, or is incomplete.
    """
    metadata = store.metadata
    kind, pre = metadata.get(f"{_PREFIX}.model"), metadata.get(f"{_PREFIX}.pre")
    how = _PRE_TOKENIZERS.get(pre) if kind == "gpt2" and isinstance(pre, str) else None
    if kind != "llama" and how is None:
        raise CheckpointError(
            f"{store.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported are 'llama' with any, and 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    try:
        tokens = _get(metadata, "tokens")
        types = _get(metadata, "token_type")
        if len(types) != len(tokens):
            raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
        ids = _special_ids(metadata, len(tokens))
        backend: Backend
        add_bos = bool(metadata.get(f"{_PREFIX}.add_bos_token", how is None or how.add_bos))
        if how is None:
            backend = _sentencepiece(store, tokens, types, unknown_id=ids.get("unk"))
        else:
            bos = tokens[ids["bos"]] if add_bos and "bos" in ids else None
            pipeline = _byte_level_bpe(how, tokens, _get(metadata, "merges"), types, bos=bos)
            backend = TokenizersBackend(pipeline)
        names = {f"{name}_token": tokens[token_id] for name, token_id in ids.items()}
        template = metadata.get("tokenizer.chat_template")
        chat = None if template is None else ChatTemplate(template, names)
    except CheckpointError:
        raise
    except Exception as err:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{store.path}: tokenizer: {err}") from err
    return Tokenizer(
        backend=backend,
        bos_id=ids.get("bos"),
        eos_ids=(ids["eos"],) if "eos" in ids else (),
        pad_id=ids.get("pad"),
        add_bos=add_bos,
        chat=chat,
    )


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    ids = {}
    for name, key in _SPECIAL.items():
        token_id = metadata.get(f"{_PREFIX}.{key}_token_id")
        if token_id is not None:
            if not 0 <= token_id < count:
                raise ValueError(f"{_PREFIX}.{key}_token_id is {token_id}, of {count} tokens")
            ids[name] = token_id
    return ids


def _sentencepiece(
    store: GGUFStore, tokens: Sequence[str], types: Sequence[int], *, unknown_id: int | None
) -> SentencePieceBackend:
    """A sentencepiece BPE, whose merge ranks are the scores."""
    pieces, kinds = list(tokens), list(types)
    # It may be listed as a control piece; sentencepiece refuses a model without an unknown one.
    if unknown_id is not None:
        kinds[unknown_id] = UNKNOWN
    elif UNKNOWN not in kinds:
        raise ValueError(f"{_PREFIX}.unknown_token_id missing")
    for token_id, kind in enumerate(kinds):
        if kind == USER_DEFINED:
            # Matched after spaces were escaped, so these have to be as well.
            pieces[token_id] = pieces[token_id].replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    proto = encode_bpe(
        pieces,
        _get(store.metadata, "scores"),
        kinds,
        add_dummy_prefix=bool(store.metadata.get(f"{_PREFIX}.add_space_prefix", True)),
    )
    # Files do not say whether text after a special token gets the dummy prefix; llama.cpp adds it.
    return SentencePieceBackend(proto, origin=store.path, added=None, prefix_everywhere=True)


def _byte_level_bpe(
    how: _PreTokenizer,
    tokens: Sequence[str],
    merges: Sequence[str],
    token_types: Sequence[int],
    *,
    bos: str | None,
) -> tokenizers.Tokenizer:
    """A BPE over bytes; `bos` is the token that it puts first when asked for special ones."""
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    pipeline = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, ignore_merges=how.whole_words)
    )
    if how.composed:
        pipeline.normalizer = normalizers.NFC()
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if how.single_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if how.words is not None:
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(how.words), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how.words is None))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    pipeline.decoder = decoders.ByteLevel()
    if bos is not None:
        pipeline.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocab[bos])]
        )
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type in (_CONTROL, USER_DEFINED):
            special = token_type == _CONTROL
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            pipeline.add_tokens([added])
    return pipeline


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    if f"{_PREFIX}.{key}" not in metadata:
        raise ValueError(f"{_PREFIX}.{key} missing")
    return metadata[f"{_PREFIX}.{key}"]
