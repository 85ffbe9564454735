"""Which tensor of a checkpoint becomes which parameter of ours, and how it is turned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        name: of the tensor in the checkpoint.
        transposed: stored as [out, in] where we keep [in, out].
        interleaved_heads: if not 0, the number of heads whose rows are stored with the two
            halves of the rotary pairs interleaved.
        offset: what the checkpoint has added to the parameter.
    """

    name: str
    transposed: bool = False
    interleaved_heads: int = 0
    offset: float = 0.0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint, given the parameter's."""
        return shape[::-1] if self.transposed else shape

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        """Turns the stored tensor into the parameter; a view of it where that is possible."""
        if self.offset:
            tensor = tensor - np.asarray(self.offset, tensor.dtype)
        if self.interleaved_heads:
            pairs = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return tensor.T if self.transposed else tensor


_HF_TOP = {
    "embed.w": "model.embed_tokens.weight",
    "norm.w": "model.norm.weight",
    "head.w": "lm_head.weight",
}
_HF_LAYER = {
    "attn_norm.w": "input_layernorm.weight",
    "attn.q.w": "self_attn.q_proj.weight",
    "attn.q.b": "self_attn.q_proj.bias",
    "attn.q_norm.w": "self_attn.q_norm.weight",
    "attn.k.w": "self_attn.k_proj.weight",
    "attn.k.b": "self_attn.k_proj.bias",
    "attn.k_norm.w": "self_attn.k_norm.weight",
    "attn.v.w": "self_attn.v_proj.weight",
    "attn.v.b": "self_attn.v_proj.bias",
    "attn.o.w": "self_attn.o_proj.weight",
    "attn.o.b": "self_attn.o_proj.bias",
    "mlp_norm.w": "post_attention_layernorm.weight",
    "mlp.gate.w": "mlp.gate_proj.weight",
    "mlp.up.w": "mlp.up_proj.weight",
    "mlp.down.w": "mlp.down_proj.weight",
}
# Where blocks normalise after attention and MLP too, the old name means another place.
_HF_POST_NORMS = _HF_LAYER | {
    "attn_post_norm.w": "post_attention_layernorm.weight",
    "mlp_norm.w": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.w": "post_feedforward_layernorm.weight",
}
_GGUF_TOP = {
    "embed.w": "token_embd.weight",
    "norm.w": "output_norm.weight",
    "head.w": "output.weight",
}
_GGUF_LAYER = {
    "attn_norm.w": "attn_norm.weight",
    "attn.q.w": "attn_q.weight",
    "attn.q.b": "attn_q.bias",
    "attn.k.w": "attn_k.weight",
    "attn.k.b": "attn_k.bias",
    "attn.v.w": "attn_v.weight",
    "attn.v.b": "attn_v.bias",
    "attn.o.w": "attn_output.weight",
    "attn.o.b": "attn_output.bias",
    "attn.q_norm.w": "attn_q_norm.weight",
    "attn.k_norm.w": "attn_k_norm.weight",
    "attn_post_norm.w": "post_attention_norm.weight",
    "mlp_norm.w": "ffn_norm.weight",
    "mlp_post_norm.w": "post_ffw_norm.weight",
    "mlp.gate.w": "ffn_gate.weight",
    "mlp.up.w": "ffn_up.weight",
    "mlp.down.w": "ffn_down.weight",
}


def hf_source(path: str, config: ModelConfig) -> Source:
    """The tensor of a hub checkpoint that holds parameter `path`."""
    in_layer = _HF_POST_NORMS if config.post_norms else _HF_LAYER
    name = _lookup(path, _HF_TOP, in_layer, "model.layers")
    return Source(name=name, transposed=_is_projection(path))


def gguf_source(path: str, config: ModelConfig) -> Source:
    """The tensor of a GGUF file that holds parameter `path`.

    For Llama and Mistral, llama.cpp rotates neighbouring elements, so its converter interleaves
    the rows of q and k. Norms that scale by 1 + w are stored with the 1 added.
    """
    heads = 0
    if config.architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        if path.endswith(("attn.q.w", "attn.q.b")):
            heads = config.num_heads
        elif path.endswith(("attn.k.w", "attn.k.b")):
            heads = config.num_kv_heads
    return Source(
        name=_lookup(path, _GGUF_TOP, _GGUF_LAYER, "blk"),
        transposed=_is_projection(path),
        interleaved_heads=heads,
        offset=1.0 if config.unit_offset and path.endswith("norm.w") else 0.0,
    )


def _lookup(
    path: str, top: Mapping[str, str], in_layer: Mapping[str, str], layers_name: str
) -> str:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    if match is None:
        return top[path]
    return f"{layers_name}.{match[1]}.{in_layer[match[2]]}"


def _is_projection(path: str) -> bool:
    return path.endswith(".w") and not path.endswith("norm.w") and path != "embed.w"
