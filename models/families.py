"""The families of models: what each is, and what it means by the keys that its files leave out."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: arithmetic that has no key, and defaults of keys.

    `window` says which layers slide: "never" any; "always" all, by `sliding_window` alone;
    "optional" the later ones and only if `use_sliding_window` is true; "alternating" the even
    ones; "pattern" all but every sixth. `layer_types` overrules the last three.
    """

    head_dim: int | None = None
    window: Literal["never", "always", "optional", "alternating", "pattern"] = "never"
    reads_attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    post_norms: bool = False
    query_scalar: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    theta: float = 10000.0
    local_theta: float | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(reads_attention_bias=True),
    "MistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(window="optional", qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        head_dim=128, window="optional", reads_attention_bias=True, qk_norm=True
    ),
    "GemmaForCausalLM": Family(head_dim=256, reads_attention_bias=True, gemma=True),
    "Gemma2ForCausalLM": Family(
        head_dim=256,
        window="alternating",
        reads_attention_bias=True,
        gemma=True,
        post_norms=True,
        query_scalar=256.0,
        attn_softcap=50.0,
        final_softcap=30.0,
    ),
    "Gemma3ForCausalLM": Family(
        head_dim=256,
        window="pattern",
        reads_attention_bias=True,
        qk_norm=True,
        gemma=True,
        post_norms=True,
        query_scalar=256.0,
        theta=1e6,
        local_theta=10000.0,
    ),
}

# Checkpoints of text and images -> the architecture of their language model, which is described
# under `text_config`, and what that may leave out.
TEXT_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3ForCausalLM",
        {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
