"""Gemma 1, 2 and 3 (text): from the second on, a block normalises after its parts as well."""

from __future__ import annotations

from jaxtyping import Array, Float

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import RMSNorm, Weights
from models.llama import Block


class SandwichBlock(Block):
    """Attention and MLP, each normalised before and after, then added to the residual stream."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        super().__init__(path, config, weights)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(f"{path}.{name}", config.hidden_size, config, weights)

        self.attn_post_norm = norm("attn_post_norm")
        self.mlp_post_norm = norm("mlp_post_norm")

    def add(
        self, x: Float[Array, "B T D"], heads: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """Adds attention and MLP, normalised, to the residual stream."""
        x = x + self.attn_post_norm(self.attn.output(heads, x.dtype))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Gemma(Decoder):
    """Gemma 2 and 3; the first Gemma has the plain blocks of `Llama`."""

    block = SandwichBlock
