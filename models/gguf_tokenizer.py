"""Rebuilds the tokenizer of a GGUF file from its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.chat import ChatTemplate
from models.errors import CheckpointError
from models.gguf_file import GGUFStore
from models.sentencepiece_proto import UNKNOWN, USER_DEFINED, encode_bpe
from models.tokenizer import Backend, Tokenizer
from models.tokenizer_backends import SentencePieceBackend, TokenizersBackend

_PREFIX = "tokenizer.ggml"
_CONTROL = 3  # of `token_type`, which has the numbers of sentencepiece
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_tokenizer(store: GGUFStore) -> Tokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Raises:
        CheckpointError: it is neither the byte-level BPE of the SmolLM family nor the
            sentencepiece BPE of Gemma, or is incomplete.
    """
    metadata = store.metadata
    kind = metadata.get(f"{_PREFIX}.model"), metadata.get(f"{_PREFIX}.pre")
    gemma = kind[0] == "llama" and metadata.get("general.architecture") == "gemma3"
    if not gemma and kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{store.path}: tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not "
            "supported; 'gpt2' with 'smollm', and the 'llama' of gemma3, are"
        )
    try:
        tokens = _get(metadata, "tokens")
        types = _get(metadata, "token_type")
        if len(types) != len(tokens):
            raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
        ids = {
            name: metadata[f"{_PREFIX}.{key}_token_id"]
            for name, key in _SPECIAL.items()
            if f"{_PREFIX}.{key}_token_id" in metadata
        }
        backend: Backend
        if gemma:
            backend = _sentencepiece(store, tokens, types, unknown_id=ids["unk"])
        else:
            pipeline = _byte_level_bpe(tokens, _get(metadata, "merges"), types)
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
        add_bos=bool(metadata.get(f"{_PREFIX}.add_bos_token", False)),
        chat=chat,
    )


def _sentencepiece(
    store: GGUFStore, tokens: Sequence[str], types: Sequence[int], *, unknown_id: int
) -> SentencePieceBackend:
    """Gemma's BPE, whose merge ranks are the scores."""
    pieces, kinds = list(tokens), list(types)
    # Listed as a control piece; sentencepiece refuses a model without an unknown one.
    kinds[unknown_id] = UNKNOWN
    for token_id, kind in enumerate(kinds):
        if kind == USER_DEFINED:
            # Matched after spaces were escaped, so these have to be as well.
            pieces[token_id] = pieces[token_id].replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    proto = encode_bpe(pieces, _get(store.metadata, "scores"), kinds)
    return SentencePieceBackend(proto, origin=store.path, added=None, prefix_everywhere=True)


def _byte_level_bpe(
    tokens: list[str], merges: list[str], token_types: list[int]
) -> tokenizers.Tokenizer:
    """GPT-2's BPE, with every digit a word of its own."""
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
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
