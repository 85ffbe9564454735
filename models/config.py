"""The numbers that define a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from models.hf_config import HF_KEYS, REQUIRED, is_count, read_fields
from models.rope import RopeConfig
from restkv_jax.protocols import LayerSpec

Activation = Literal["silu", "gelu_tanh"]


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
        post_norms: what attention and MLP give is normalised before it is added.
        unit_offset: norms scale by 1 + w, not by w.
        scaled_embeddings: token embeddings are multiplied by sqrt(D).
        activation: of the gated MLP.
        local_rope: the rotary embedding of layers with a window; None for `rope` there too.
        query_scalar: logits are divided by its root; None for H.
        attn_softcap: c of `c * tanh(logits / c)` in the attention, or None.
        final_softcap: the same on the model's logits, or None.
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
    post_norms: bool = False
    unit_offset: bool = False
    scaled_embeddings: bool = False
    activation: Activation = "silu"
    local_rope: RopeConfig | None = None
    query_scalar: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for field in (*REQUIRED, "num_kv_heads", "head_dim"):
            self._require(is_count(getattr(self, field)), field, "a positive integer")
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_attention_heads {self.num_heads}",
        )
        self._require(self.head_dim % 2 == 0, "head_dim", "even, for the rotary embedding")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.frequencies(self.head_dim)  # a scaling may be of another head size
        self._require(0 <= self.rms_eps < 1, "rms_eps", "in [0, 1)")
        for field in ("query_scalar", "attn_softcap", "final_softcap"):
            value = getattr(self, field)
            self._require(value is None or value > 0, field, "positive")
        self._require(
            self.max_length is None or is_count(self.max_length),
            "max_length",
            "a positive integer",
        )
        self._require(
            len(self.windows) == self.num_layers
            and all(window is None or is_count(window) for window in self.windows),
            "windows",
            f"a positive integer or null for each of {self.num_layers} layers",
        )

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What `restkv_jax` has to know of each layer."""
        scalar = self.head_dim if self.query_scalar is None else self.query_scalar
        return tuple(
            LayerSpec(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=scalar**-0.5,
                softcap=self.attn_softcap,
                window=window,
                rotary=tuple(
                    (self.rope if window is None else self.local_rope or self.rope)
                    .frequencies(self.head_dim)
                    .tolist()
                ),
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
        return cls(**read_fields(hf))

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"{HF_KEYS[field]} is {value!r}: must be {wanted}")
