"""How a hub `config.json` spells a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.families import FAMILIES, TEXT_PARTS, Family
from models.rope import FrequencyFactors, LinearScaling, Llama3Scaling, RopeConfig

# Field of `models.config.ModelConfig` -> the key that checkpoints use. Error messages show it.
HF_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_size": "intermediate_size",
    "rms_eps": "rms_norm_eps",
    "windows": "sliding_window",
    "query_scalar": "query_pre_attn_scalar",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "max_length": "max_position_embeddings",
}
REQUIRED = ("vocab_size", "num_layers", "hidden_size", "num_heads", "mlp_size")


def has_text_part(hf: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of text and images, of which the text alone is read."""
    names = hf.get("architectures")
    return isinstance(names, list) and len(names) == 1 and names[0] in TEXT_PARTS


def read_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the content of a hub `config.json`; see `models.config.ModelConfig.from_hf`.

    Args:
        hf: the parsed file.

    Returns:
        The arguments of `ModelConfig`, which checks their ranges.

    Raises:
        ValueError: a key is missing or not understood; the message names it.
    """
    if has_text_part(hf):
        hf = _text_part(hf)
    architecture = _architecture(hf)
    family = FAMILIES[architecture]
    _refuse_unsupported(hf, family)
    missing = [HF_KEYS[field] for field in REQUIRED if hf.get(HF_KEYS[field]) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    sizes = {field: hf[HF_KEYS[field]] for field in REQUIRED}
    for field, value in sizes.items():
        if not is_count(value):
            raise ValueError(f"{HF_KEYS[field]} is {value!r}: must be a positive integer")
    num_heads, num_layers = sizes["num_heads"], sizes["num_layers"]
    attention_bias = family.reads_attention_bias and bool(hf.get("attention_bias"))
    return {
        "architecture": architecture,
        **sizes,
        "num_kv_heads": _get(hf, "num_key_value_heads", num_heads),
        "head_dim": _get(hf, "head_dim", family.head_dim or sizes["hidden_size"] // num_heads),
        "rms_eps": _number(hf, "rms_norm_eps", 1e-6),
        "windows": _windows(hf, family, num_layers),
        "tied_embeddings": bool(_get(hf, "tie_word_embeddings", family.gemma)),
        "qkv_bias": family.qkv_bias or attention_bias,
        "out_bias": attention_bias,
        "qk_norm": family.qk_norm,
        "post_norms": family.post_norms,
        "unit_offset": family.gemma,
        "scaled_embeddings": family.gemma,
        "activation": "gelu_tanh" if family.gemma else "silu",
        **_ropes(hf, family),
        **_logit_arithmetic(hf, family),
        "max_length": hf.get("max_position_embeddings"),
    }


def _text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    architecture, defaults = TEXT_PARTS[hf["architectures"][0]]
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"text_config is {text!r}: must be an object")
    outer = {key: hf.get(key) for key in ("tie_word_embeddings", "quantization_config")}
    said = {key: value for key, value in text.items() if value is not None}
    # `text` goes first for its nulls: some mean "none", not "left out".
    return text | outer | defaults | said | {"architectures": [architecture]}


def is_count(value: object) -> bool:
    """Whether `value` is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures")
    if not (isinstance(names, list) and len(names) == 1):
        raise ValueError(f"architectures is {names!r}: must be a list of one name")
    if names[0] not in FAMILIES:
        supported = ", ".join((*FAMILIES, *TEXT_PARTS))
        raise ValueError(f"architecture {names[0]!r} is not supported; supported are {supported}")
    return names[0]


def _refuse_unsupported(hf: Mapping[str, Any], family: Family) -> None:
    if hf.get("quantization_config") is not None:
        raise ValueError("quantization_config is set: quantised safetensors are not supported")
    if hf.get("mlp_bias"):
        raise ValueError("mlp_bias is true: biases in the MLP are not supported")
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true: attention is causal here")
    key, known = "hidden_act", ["silu", "swish"]
    if family.gemma:
        known = ["gelu_pytorch_tanh"]
        if hf.get("hidden_activation") is not None:
            key = "hidden_activation"
        else:
            # The first Gemma files say this and mean the tanh approximation.
            known.append("gelu")
    activation = _get(hf, key, known[0])
    if activation not in known:
        raise ValueError(f"{key} is {activation!r}: must be {known[0]!r}")


def _ropes(hf: Mapping[str, Any], family: Family) -> dict[str, RopeConfig | None]:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = _get(hf, key, {})
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {rope!r}: must be an object or null")
    theta = _number(hf, "rope_theta", family.theta)
    if family.local_theta is None:
        return {"rope": _rope(hf, rope, key, theta), "local_rope": None}
    local_theta = _number(hf, "rope_local_base_freq", family.local_theta)
    # transformers 5 has one object for each kind of layer; before, scaling was of the global ones.
    by_kind = isinstance(rope.get("full_attention"), dict)
    everywhere = rope["full_attention"] if by_kind else rope
    local = _get(rope, "sliding_attention", {}) if by_kind else {}
    return {
        "rope": _rope(hf, everywhere, key, theta),
        "local_rope": _rope(hf, local, key, local_theta),
    }


def _rope(hf: Mapping[str, Any], rope: Mapping[str, Any], key: str, theta: float) -> RopeConfig:
    theta = _number(rope, "rope_theta", theta)
    share = _number(rope, "partial_rotary_factor", _number(hf, "partial_rotary_factor", 1.0))
    if share != 1:
        raise ValueError(f"partial_rotary_factor is {share}: only whole heads can be rotated")
    # Files older than transformers 4.43 say "type".
    kind = _get(rope, "rope_type", _get(rope, "type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling=LinearScaling(factor=_number(rope, "factor")))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_positions=int(_number(rope, "original_max_position_embeddings")),
        )
        return RopeConfig(theta=theta, scaling=scaling)
    if kind == "longrope":
        return RopeConfig(theta=theta, scaling=_factors(rope))
    raise ValueError(
        f"rope_type {kind!r} in {key} is not supported: default, linear, llama3, or longrope with "
        "one list of factors"
    )


def _factors(rope: Mapping[str, Any]) -> FrequencyFactors:
    """Of a "longrope" that stretches short and long texts alike, as `models.hf_write` has it."""
    factors = rope.get("long_factor")
    if not (isinstance(factors, list) and factors == rope.get("short_factor")):
        raise ValueError("long_factor and short_factor: must be one and the same list")
    if _number(rope, "attention_factor") != 1:
        raise ValueError(f"attention_factor is {rope['attention_factor']!r}: must be 1")
    return FrequencyFactors(factors=tuple(map(float, factors)))


def _logit_arithmetic(hf: Mapping[str, Any], family: Family) -> dict[str, float | None]:
    """The scalar and the caps, of the families that have them; a null means none."""
    if family.query_scalar is None:
        return {}
    found: dict[str, float | None] = {}
    for field in ("query_scalar", "attn_softcap", "final_softcap"):
        default, key = getattr(family, field), HF_KEYS[field]
        found[field] = None if hf.get(key, default) is None else _number(hf, key, default)
    return found


def _windows(hf: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.window == "always":
        # The family's default where the key is left out; a null means no window.
        return (hf.get("sliding_window", 4096),) * num_layers
    optional = family.window == "optional"
    if family.window == "never" or (optional and not hf.get("use_sliding_window")):
        return (None,) * num_layers
    kinds = _get(hf, "layer_types", _default_kinds(hf, family, num_layers))
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types has {sorted(unknown)}: full or sliding attention only")
    window = hf.get("sliding_window", None if optional else 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _default_kinds(hf: Mapping[str, Any], family: Family, num_layers: int) -> list[str]:
    if family.window == "optional":
        first = _get(hf, "max_window_layers", 28)
        slides = [layer >= first for layer in range(num_layers)]
    elif family.window == "alternating":
        slides = [layer % 2 == 0 for layer in range(num_layers)]
    else:
        period = _get(hf, "sliding_window_pattern", _get(hf, "_sliding_window_pattern", 6))
        if not is_count(period):
            raise ValueError(f"sliding_window_pattern is {period!r}: must be a positive integer")
        slides = [(layer + 1) % period != 0 for layer in range(num_layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _get(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of `key`, with null meaning left out."""
    value = hf.get(key)
    return default if value is None else value


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _get(hf, key, default)
    if value is None:
        raise ValueError(f"{key} missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}: must be a number")
    return float(value)
