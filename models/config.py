"""The numbers that define a network, and how a hub `config.json` spells them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from models.rope import LinearScaling, Llama3Scaling, RopeConfig
from restkv_jax.protocols import LayerSpec

# Field of `ModelConfig` -> the key that checkpoints use. Error messages show the latter.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_size": "intermediate_size",
    "rms_eps": "rms_norm_eps",
    "windows": "sliding_window",
    "max_length": "max_position_embeddings",
}
_REQUIRED = ("vocab_size", "num_layers", "hidden_size", "num_heads", "mlp_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of a decoder-only network; hashable, so static under jit.

    Attributes:
        architecture: the name in a hub config's `architectures`, e.g. "LlamaForCausalLM".
        vocab_size: V, rows of the embedding (the tokenizer may know fewer tokens).
        num_layers: L.
        hidden_size: D.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; divides N.
        head_dim: H, even; N * H need not be D.
        mlp_size: F.
        rms_eps: epsilon of every RMSNorm.
        rope: the rotary embedding.
        windows: sliding window of each layer, the query itself counted; None sees all.
        tied_embeddings: the unembedding is the embedding, transposed.
        qkv_bias: the q, k and v projections have biases.
        out_bias: the attention's output projection has a bias.
        qk_norm: queries and keys are normalised per head before the rotation.
        max_length: tokens that the model was made for; None where the checkpoint does not say.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rms_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        for field in (*_REQUIRED, "num_kv_heads", "head_dim"):
            self._require(_is_count(getattr(self, field)), field, "a positive integer")
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_attention_heads {self.num_heads}",
        )
        self._require(self.head_dim % 2 == 0, "head_dim", "even, for the rotary embedding")
        self._require(0 <= self.rms_eps < 1, "rms_eps", "in [0, 1)")
        self._require(
            self.max_length is None or _is_count(self.max_length),
            "max_length",
            "a positive integer",
        )
        self._require(
            len(self.windows) == self.num_layers
            and all(window is None or _is_count(window) for window in self.windows),
            "windows",
            f"a positive integer or null for each of {self.num_layers} layers",
        )

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What `restkv_jax` has to know of each layer."""
        return tuple(
            LayerSpec(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                window=window,
            )
            for window in self.windows
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a hub `config.json`, of any transformers version.

        Keys that files of a family leave out get that family's default; sizes have none.

        Args:
            hf: the parsed file.

        Returns:
            The configuration.

        Raises:
            ValueError: a key is missing, out of range, or asks for something unsupported; the
                message names it.
        """
        architecture = _architecture(hf)
        family = _FAMILIES[architecture]
        _refuse_unsupported(hf)
        missing = [_HF_KEYS[field] for field in _REQUIRED if hf.get(_HF_KEYS[field]) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        sizes = {field: hf[_HF_KEYS[field]] for field in _REQUIRED}
        for field, value in sizes.items():
            if not _is_count(value):
                raise ValueError(f"{_HF_KEYS[field]} is {value!r}: must be a positive integer")
        num_heads, num_layers = sizes["num_heads"], sizes["num_layers"]
        attention_bias = family.reads_attention_bias and bool(hf.get("attention_bias"))
        return cls(
            architecture=architecture,
            **sizes,
            num_kv_heads=_get(hf, "num_key_value_heads", num_heads),
            head_dim=_get(hf, "head_dim", family.head_dim or sizes["hidden_size"] // num_heads),
            rms_eps=_number(hf, "rms_norm_eps", 1e-6),
            rope=_rope(hf),
            windows=_windows(hf, family, num_layers),
            tied_embeddings=bool(_get(hf, "tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            out_bias=attention_bias,
            qk_norm=family.qk_norm,
            max_length=hf.get("max_position_embeddings"),
        )

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"{_HF_KEYS[field]} is {value!r}: must be {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What an architecture means by the keys that its files leave out.

    `window` says when layers slide: "never"; "always", by `sliding_window` alone; or
    "optional", in the later layers and only if `use_sliding_window` is true.
    """

    head_dim: int | None = None
    window: str = "never"
    reads_attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family(reads_attention_bias=True),
    "MistralForCausalLM": _Family(window="always"),
    "Qwen2ForCausalLM": _Family(window="optional", qkv_bias=True),
    "Qwen3ForCausalLM": _Family(
        head_dim=128, window="optional", reads_attention_bias=True, qk_norm=True
    ),
}


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures")
    if not (isinstance(names, list) and len(names) == 1):
        raise ValueError(f"architectures is {names!r}: must be a list of one name")
    if names[0] not in _FAMILIES:
        raise ValueError(
            f"architecture {names[0]!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    return names[0]


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    if hf.get("quantization_config") is not None:
        raise ValueError("quantization_config is set: quantised safetensors are not supported")
    activation = _get(hf, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}: must be 'silu'")
    if hf.get("mlp_bias"):
        raise ValueError("mlp_bias is true: biases in the MLP are not supported")


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = _get(hf, key, {})
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {rope!r}: must be an object or null")
    theta = _number(rope, "rope_theta", _number(hf, "rope_theta", 10000.0))
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
    raise ValueError(f"rope_type {kind!r} in {key} is not supported: default, linear or llama3")


def _windows(hf: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if family.window == "always":
        # The family's default where the key is left out; a null means no window.
        return (hf.get("sliding_window", 4096),) * num_layers
    if family.window == "never" or not hf.get("use_sliding_window"):
        return (None,) * num_layers
    first_sliding = _get(hf, "max_window_layers", 28)
    kinds = _get(
        hf,
        "layer_types",
        [
            "sliding_attention" if layer >= first_sliding else "full_attention"
            for layer in range(num_layers)
        ],
    )
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types has {sorted(unknown)}: full or sliding attention only")
    window = hf.get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
