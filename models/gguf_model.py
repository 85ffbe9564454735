"""Reads the network and its weights from one GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.errors import CheckpointError
from models.gguf_file import GGUFStore
from models.names import gguf_source
from models.rope import FrequencyFactors
from models.weights import Parameters, match

# llama.cpp's name of an architecture -> the hub's.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
# Key without the architecture in front of it -> the hub's key; these must be there.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONS = {
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
}
# Gemma divides its logits by the root of the head size, but for the 27B models, which divide by
# that of hidden size / heads. Files do not say so; the layer count tells them apart.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
# Divisors of the rotary frequencies, written for the scaling of Llama 3.1.
_ROPE_FACTORS = "rope_freqs.weight"


def open_weights(store: GGUFStore) -> Parameters:
    """Finds the parameters of the network that a GGUF file says it is.

    Raises:
        CheckpointError: the architecture is not supported, a key is missing or out of range, or
            the tensors do not fit (see `models.weights.match`).
    """
    return match(read_config(store), store, gguf_source, ignored={_ROPE_FACTORS})


def read_config(store: GGUFStore) -> ModelConfig:
    """Reads a GGUF file's metadata, by way of the hub's keys.

    Raises:
        CheckpointError: the architecture is not supported, or a key is missing or out of range.
    """
    try:
        config = ModelConfig.from_hf(_hub_keys(store))
        if _ROPE_FACTORS in store.shapes:
            factors = tuple(store.read(_ROPE_FACTORS).ravel().tolist())
            if config.rope.scaling is not None:
                raise ValueError(f"{_ROPE_FACTORS} beside another scaling of the frequencies")
            rope = dataclasses.replace(config.rope, scaling=FrequencyFactors(factors=factors))
            config = dataclasses.replace(config, rope=rope)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{store.path}: {err}") from err
    return config


def _hub_keys(store: GGUFStore) -> dict[str, Any]:
    metadata = store.metadata
    name = _get(metadata, "general.architecture")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(f"GGUF architecture {name!r} is not supported; supported are {supported}")
    # Without the architecture in front of the keys.
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    missing = [f"{name}.{key}" for key in _SIZES if key not in own]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    if own.get("expert_count"):
        raise ValueError(f"{name}.expert_count is {own['expert_count']}: no mixtures of experts")
    hub = {key: own[ours] for ours, key in (_SIZES | _OPTIONS).items() if ours in own}
    hub |= {
        "architectures": [_ARCHITECTURES[name]],
        "vocab_size": len(_get(metadata, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in store.shapes,
        "rope_scaling": _rope_scaling(name, own),
    }
    num_heads = max(hub["num_attention_heads"], 1)
    head_dim = own.get("attention.key_length", hub["hidden_size"] // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"{name}.{key} is {own[key]}: must be the head size, {head_dim}")
    hub["head_dim"] = head_dim
    if name in _GEMMA_27B_LAYERS:
        is_27b = hub["num_hidden_layers"] == _GEMMA_27B_LAYERS[name]
        hub["query_pre_attn_scalar"] = hub["hidden_size"] / num_heads if is_27b else head_dim
    else:
        hub["attention_bias"] = name == "llama" and "blk.0.attn_q.bias" in store.shapes
    return hub | _windows(name, own)


def _windows(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What says which layers slide, where that is not as `_OPTIONS` reads it."""
    window = own.get("attention.sliding_window")
    if name == "gemma3":
        pattern = own.get("attention.sliding_window_pattern")
        if not window:
            return {"sliding_window_pattern": 1}
        if isinstance(pattern, list):
            kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
            return {"layer_types": kinds, "sliding_window_pattern": None}
    elif name == "llama" and window:
        return {"architectures": ["MistralForCausalLM"]}
    elif name != "gemma2" and window:
        raise ValueError(f"{name}.attention.sliding_window is {window}: must be left out or 0")
    return {}


def _rope_scaling(name: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "linear")
    # As in llama.cpp: linear where the type is left out, and none without a factor.
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind != "linear":
        raise ValueError(f"{name}.rope.scaling.type {kind!r} is not supported")
    return {"rope_type": "linear", "factor": factor}


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{key} missing")
    return metadata[key]
