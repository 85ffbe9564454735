"""Which network an architecture is."""

from __future__ import annotations

from models.config import ModelConfig
from models.decoder import Decoder
from models.gemma import Gemma
from models.layers import Weights
from models.llama import Llama

NETWORKS: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "GemmaForCausalLM": Llama,
    "Gemma2ForCausalLM": Gemma,
    "Gemma3ForCausalLM": Gemma,
}
"""The name in a hub config's `architectures` -> the network's class."""


def make_network(config: ModelConfig, weights: Weights) -> Decoder:
    """Builds the network of `config.architecture`; arguments as of `Decoder`."""
    return NETWORKS[config.architecture](config, weights)
