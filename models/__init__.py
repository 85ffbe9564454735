"""Small implementations of open decoder-only models, and loaders for their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError
from models.gemma import Gemma
from models.llama import Llama
from models.sources import resolve
from models.tokenizer import Tokenizer
from models.weights import Sharding, quantize_weights, weights_bytes

__all__ = [
    "DTYPES",
    "CheckpointError",
    "Gemma",
    "LanguageModel",
    "Llama",
    "ModelConfig",
    "Tokenizer",
    "load",
    "quantize_weights",
]

DTYPES = ("float32", "bfloat16", "int8")
"""What `load` takes; the last is of matrices, beside which all else is bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A network with its tokenizer.

    Attributes:
        name: the name it was loaded by.
        model: the network.
        tokenizer: raises CheckpointError when used if the checkpoint came without one.
        config: shape and arithmetic of the network.
        eos_ids: tokens that end a text, as the checkpoint says.
        turn_end_ids: tokens that end a turn of a chat, such as <|im_end|>; may be in both.
        weights_bytes: memory that the weights take.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    eos_ids: tuple[int, ...]
    turn_end_ids: tuple[int, ...]
    weights_bytes: int


def load(
    spec: str | Path, *, dtype: str = "float32", sharding: Sharding | None = None
) -> LanguageModel:
    """Loads a model.

    Args:
        spec: a checkpoint folder in the hub's layout or as `models.convert` writes it, a `.gguf`
            file, a hub id "owner/name", or a small model's name (see `models.sources.NAMED`).
        dtype: of weights and activations, "float32" or "bfloat16"; normalisation, softmax and
            logits are float32 in both. "int8" is bfloat16 with matrices of int8, one scale for
            each output; what is multiplied with them is rounded to int8 as well.
        sharding: from a parameter's path and shape to where it goes, see `models.weights`; by
            default all are on the default device. Tensors are placed one at a time, so the host
            holds about one of them.

    Returns:
        The model, complete: every parameter comes from the checkpoint.

    Raises:
        CheckpointError: the model is not found, damaged, incomplete or unsupported.
        ValueError: `dtype` is none of these, or a sharding does not fit its parameter.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(resolve(spec))
    model = checkpoint.build(jnp.dtype(dtype), sharding)
    return LanguageModel(
        name=str(spec),
        model=model,
        tokenizer=checkpoint.tokenizer,
        config=model.config,
        eos_ids=checkpoint.eos_ids,
        turn_end_ids=checkpoint.tokenizer.turn_end_ids,
        weights_bytes=weights_bytes(model),
    )
