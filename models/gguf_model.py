"""Reads the network and its weights from one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError
from models.gguf_file import GGUFStore
from models.names import gguf_source
from models.rope import LinearScaling, RopeConfig
from models.weights import Sharding, build

# llama.cpp's name of an architecture -> the hub's.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}
# Only the 27B model divides its logits by something else than the head size, and files do not
# say so; the layer count tells it apart.
_GEMMA3_27B_LAYERS = 62
_GEMMA3_PERIOD = 6


def read_model(store: GGUFStore, dtype: DTypeLike, sharding: Sharding | None) -> Decoder:
    """Builds the network of a GGUF file.

    Raises:
        CheckpointError: the architecture is not supported, a key is missing or out of range, or
            the tensors do not fit (see `models.weights.build`).
    """
    try:
        config = _read_config(store)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{store.path}: {err}") from err
    return build(config, store, gguf_source, dtype, sharding)


def _read_config(store: GGUFStore) -> ModelConfig:
    metadata = store.metadata
    name = _get(metadata, "general.architecture")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(f"GGUF architecture {name!r} is not supported; supported are {supported}")
    # Without the architecture in front of the keys.
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    missing = [key for key in _KEYS if key not in own]
    if missing:
        raise ValueError(f"{', '.join(f'{name}.{key}' for key in missing)} missing")
    sizes = {field: own[key] for key, field in _KEYS.items()}
    num_heads, num_layers = sizes["num_heads"], sizes["num_layers"]
    head_dim = own.get("attention.key_length", sizes["hidden_size"] // max(num_heads, 1))
    if own.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{name}.rope.dimension_count: only whole heads can be rotated")
    return ModelConfig(
        architecture=_ARCHITECTURES[name],
        vocab_size=len(_get(metadata, "tokenizer.ggml.tokens")),
        **sizes,
        num_kv_heads=own.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope=_rope(name, own),
        tied_embeddings="output.weight" not in store.shapes,
        max_length=own.get("context_length"),
        **(_gemma3(own, sizes) if name == "gemma3" else {"windows": (None,) * num_layers}),
    )


_KEYS = {
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_heads",
    "feed_forward_length": "mlp_size",
    "attention.layer_norm_rms_epsilon": "rms_eps",
}


def _rope(name: str, own: Mapping[str, Any]) -> RopeConfig:
    theta = own.get("rope.freq_base", 10000.0)
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta=theta)
    if kind == "linear":
        factor = _get(own, "rope.scaling.factor")
        return RopeConfig(theta=theta, scaling=LinearScaling(factor=factor))
    raise ValueError(f"{name}.rope.scaling.type {kind!r} is not supported")


def _gemma3(own: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 3 is, and files leave out."""
    num_layers, window = sizes["num_layers"], _get(own, "attention.sliding_window")
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    return {
        "windows": tuple(
            None if (layer + 1) % _GEMMA3_PERIOD == 0 else window for layer in range(num_layers)
        ),
        "qk_norm": True,
        "post_norms": True,
        "unit_offset": True,
        "scaled_embeddings": True,
        "activation": "gelu_tanh",
        "local_rope": RopeConfig(theta=own.get("rope.freq_base_swa", 10000.0)),
        "query_scalar": sizes["hidden_size"] / sizes["num_heads"] if is_27b else None,
    }


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{key} missing")
    return metadata[key]
