"""Reads a folder in the layout of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from models.chat import ChatTemplate
from models.config import ModelConfig
from models.errors import CheckpointError
from models.hf_config import has_text_part
from models.multimodal import image_tensors, text_source
from models.names import hf_source
from models.safetensors_file import SafetensorsStore, read_json
from models.tokenizer import Tokenizer
from models.tokenizer_backends import MissingBackend, SentencePieceBackend, TokenizersBackend
from models.weights import Parameters, match

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def open_weights(folder: Path) -> Parameters:
    """Finds the parameters of the network that `config.json` describes in the safetensors.

    Of a checkpoint of text and images that is the language model, see `models.multimodal`.

    Raises:
        CheckpointError: see `ModelConfig.from_hf`, `SafetensorsStore` and `match`.
    """
    config, store = read_config(folder), SafetensorsStore(folder)
    if not has_text_part(read_json(folder / "config.json")):
        return match(config, store, hf_source)
    return match(config, store, text_source(store), ignored=image_tensors(store))


def read_config(folder: Path) -> ModelConfig:
    """Reads `config.json`.

    Raises:
        CheckpointError: the file is missing or damaged, or see `ModelConfig.from_hf`.
    """
    path = folder / "config.json"
    content = read_json(path)
    try:
        return ModelConfig.from_hf(content)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{path}: {err}") from err


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text, from `config.json` and, where there is one, `generation_config.json`.

    Raises:
        CheckpointError: a file cannot be read, or the value is neither an id nor a list of ids.
    """
    found: list[int] = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        value = read_json(path).get("eos_token_id") if path.exists() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) for i in ids):
            raise CheckpointError(f"{path}: eos_token_id is {value!r}")
        found += ids
    return tuple(dict.fromkeys(found))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a folder: `tokenizer.json` if there, else `tokenizer.model`.

    Args:
        folder: may have neither; the tokenizer then raises CheckpointError when it is used.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        return _read_tokenizer(folder)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{folder}: tokenizer files: {err!r}") from err


def _read_tokenizer(folder: Path) -> Tokenizer:
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    names = _special_tokens(config)
    if (folder / "tokenizer.json").exists():
        backend = _read_pipeline(folder / "tokenizer.json")
        bos_id = _optional_id(backend, names.get("bos_token"))
        add_bos = bos_id is not None and backend.prefix()[:1] == [bos_id]
        return _assemble(folder, config, names, backend, bos_id, add_bos)
    if (folder / "tokenizer.model").exists():
        pieces = _read_sentencepiece(folder / "tokenizer.model", config)
        bos_id = _optional_id(pieces, names.get("bos_token", "<s>"))
        return _assemble(
            folder, config, names, pieces, bos_id, bool(config.get("add_bos_token", True))
        )
    return Tokenizer(backend=MissingBackend(folder))


def _assemble(
    folder: Path,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    backend: TokenizersBackend | SentencePieceBackend,
    bos_id: int | None,
    add_bos: bool,
) -> Tokenizer:
    eos_id = _optional_id(backend, names.get("eos_token"))
    template = _chat_template(folder, config)
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=() if eos_id is None else (eos_id,),
        pad_id=_optional_id(backend, names.get("pad_token")),
        add_bos=add_bos,
        chat=None if template is None else ChatTemplate(template, names),
    )


def _read_pipeline(path: Path) -> TokenizersBackend:
    try:
        return TokenizersBackend(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as err:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({err})") from err


def _read_sentencepiece(path: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    try:
        proto = path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err})") from err
    entries = config.get("added_tokens_decoder")
    legacy = bool(config.get("legacy", True))
    if not entries:
        return SentencePieceBackend(proto, origin=path, added=None, prefix_everywhere=legacy)
    return SentencePieceBackend(
        proto,
        origin=path,
        added={entry["content"]: int(i) for i, entry in entries.items()},
        skipped=frozenset(int(i) for i, entry in entries.items() if entry.get("special")),
        prefix_everywhere=legacy,
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Variable name -> token; files write a token as a string, an object, or null."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return own_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several named ones; "default" is for conversations.
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def _optional_id(
    backend: TokenizersBackend | SentencePieceBackend, token: str | None
) -> int | None:
    return None if token is None else backend.token_id(token)
