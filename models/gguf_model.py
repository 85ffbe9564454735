"""Reads network, weights and tokenizer from one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from jaxtyping import DTypeLike
from tokenizers import decoders, models, pre_tokenizers

from models.chat import ChatTemplate
from models.config import ModelConfig
from models.errors import CheckpointError
from models.gguf_file import GGUFStore
from models.llama import Llama
from models.names import gguf_llama_source
from models.rope import RopeConfig
from models.tokenizer import Tokenizer
from models.tokenizer_backends import TokenizersBackend
from models.weights import build

# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4
_TOKENIZER = "tokenizer.ggml"


def read_model(store: GGUFStore, dtype: DTypeLike) -> Llama:
    """Builds the network of a GGUF file.

    Raises:
        CheckpointError: the architecture is not "llama", a key is missing or out of range, or
            the tensors do not fit (see `models.weights.build`).
    """
    try:
        config = _read_config(store)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{store.path}: {err}") from err
    return build(config, store, gguf_llama_source, dtype)


def read_tokenizer(store: GGUFStore) -> Tokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Raises:
        CheckpointError: it is not the byte-level BPE of the SmolLM family, or is incomplete.
    """
    metadata = store.metadata
    kind = metadata.get(f"{_TOKENIZER}.model"), metadata.get(f"{_TOKENIZER}.pre")
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{store.path}: tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not "
            "supported; 'gpt2' with 'smollm' is"
        )
    try:
        tokens = _get(metadata, f"{_TOKENIZER}.tokens")
        pipeline = _byte_level_bpe(
            tokens,
            _get(metadata, f"{_TOKENIZER}.merges"),
            _get(metadata, f"{_TOKENIZER}.token_type"),
        )
        ids = {
            name: metadata[f"{_TOKENIZER}.{key}_token_id"]
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if f"{_TOKENIZER}.{key}_token_id" in metadata
        }
        names = {f"{name}_token": tokens[token_id] for name, token_id in ids.items()}
        template = metadata.get("tokenizer.chat_template")
        chat = None if template is None else ChatTemplate(template, names)
    except Exception as err:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{store.path}: tokenizer: {err}") from err
    return Tokenizer(
        backend=TokenizersBackend(pipeline),
        bos_id=ids.get("bos"),
        eos_ids=(ids["eos"],) if "eos" in ids else (),
        pad_id=ids.get("pad"),
        add_bos=bool(metadata.get(f"{_TOKENIZER}.add_bos_token", False)),
        chat=chat,
    )


def _read_config(store: GGUFStore) -> ModelConfig:
    metadata = store.metadata
    architecture = _get(metadata, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; 'llama' is")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"llama.rope.scaling.type {scaling!r} is not supported")
    hidden_size = _get(metadata, "llama.embedding_length")
    num_heads = _get(metadata, "llama.attention.head_count")
    num_layers = _get(metadata, "llama.block_count")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // max(num_heads, 1))
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("llama.rope.dimension_count: only whole heads can be rotated")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=len(_get(metadata, f"{_TOKENIZER}.tokens")),
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=_get(metadata, "llama.feed_forward_length"),
        rms_eps=_get(metadata, "llama.attention.layer_norm_rms_epsilon"),
        rope=RopeConfig(theta=metadata.get("llama.rope.freq_base", 10000.0)),
        windows=(None,) * num_layers,
        tied_embeddings="output.weight" not in store.shapes,
        max_length=metadata.get("llama.context_length"),
    )


def _byte_level_bpe(
    tokens: list[str], merges: list[str], token_types: list[int]
) -> tokenizers.Tokenizer:
    """GPT-2's BPE, with every digit a word of its own."""
    if len(token_types) != len(tokens):
        raise ValueError(f"{len(token_types)} token types for {len(tokens)} tokens")
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
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            pipeline.add_tokens([added])
    return pipeline


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{key} missing")
    return metadata[key]
