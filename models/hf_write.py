"""Writes a configuration as the hub's `config.json` spells it."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import ModelConfig
from models.hf_config import HF_KEYS
from models.rope import FrequencyFactors, Llama3Scaling, RopeConfig

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What `ModelConfig.from_hf` reads as `config`."""
    windows = [window for window in config.windows if window is not None]
    ropes = _rope(config.rope)
    if config.local_rope is not None:
        ropes = {"full_attention": ropes, "sliding_attention": _rope(config.local_rope)}
    return {
        "architectures": [config.architecture],
        **{key: getattr(config, field) for field, key in HF_KEYS.items() if field != "windows"},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.out_bias,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rope_parameters": ropes,
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ],
    }


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    if isinstance(rope.scaling, FrequencyFactors):
        factors = list(rope.scaling.factors)
        return {
            "rope_type": "longrope",
            "rope_theta": rope.theta,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }
    numbers = dataclasses.asdict(rope.scaling)
    kind = "linear"
    if isinstance(rope.scaling, Llama3Scaling):
        kind = "llama3"
        numbers["original_max_position_embeddings"] = numbers.pop("original_max_positions")
    return {"rope_type": kind, "rope_theta": rope.theta, **numbers}
