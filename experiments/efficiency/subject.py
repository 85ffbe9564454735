"""The network that is measured: a checkpoint, or published shapes with random weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import models
from experiments.core.errors import UserError
from models.registry import NETWORKS
from restkv_jax.decode import CausalLM, with_output_factors

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(vocab: int, hidden: int, layers: int, heads: int, kv: int, mlp: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
    }


# What the published `config.json` files say of shapes and rotary embeddings.
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _llama(128256, 4096, 32, 32, 8, 14336)
    | {"rope_theta": 500000.0, "rope_scaling": _LLAMA31_ROPE},
    # Mistral-7B-Instruct-v0.2: no sliding window.
    "mistral-7b": _llama(32000, 4096, 32, 32, 8, 14336)
    | {"architectures": ["MistralForCausalLM"], "rope_theta": 1000000.0, "sliding_window": None},
    "smollm2-135m": _llama(49152, 576, 30, 9, 3, 1536)
    | {"rope_theta": 100000.0, "tie_word_embeddings": True},
    "tiny": _llama(128, 32, 2, 4, 2, 64),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network whose weights need not be there yet.

    Attributes:
        name: as the user wrote it.
        config: its shapes.
        dtype: of weights, as `models.load` takes it.
        make: makes or hands over the network, with factors of its output projections.
    """

    name: str
    config: models.ModelConfig
    dtype: str
    make: Callable[[], CausalLM]

    @functools.cached_property
    def abstract(self) -> CausalLM:
        """The network with shapes in place of arrays; nothing is allocated."""
        return jax.eval_shape(self.make)

    @functools.cached_property
    def model(self) -> CausalLM:
        """The network."""
        return self.make()


def open_subject(name: str, dtype: str) -> Subject:
    """Finds a network.

    Args:
        name: "random:" and one of `RANDOM`, or whatever `models.load` takes.
        dtype: of weights and activations.

    Raises:
        UserError: there is none.
    """
    kind, colon, shape = name.partition(":")
    if colon and kind == "random":
        if shape not in RANDOM:
            raise UserError(f"--model {name}: unknown shape, known are {', '.join(RANDOM)}")
        config = models.ModelConfig.from_hf(RANDOM[shape])
        network = NETWORKS[config.architecture]
        return Subject(
            name,
            config,
            dtype,
            lambda: with_output_factors(network.init(config, dtype=jnp.dtype(dtype))),
        )
    try:
        loaded = models.load(name, dtype=dtype)
    except models.CheckpointError as error:
        raise UserError(f"--model {name}: {error}") from None
    return Subject(name, loaded.config, dtype, lambda: with_output_factors(loaded.model))
