"""Gemma 1, 2 and 3 (text): from the second on, a block normalises after its parts as well."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, GatedMLP, RMSNorm, Weights
from restkv_jax.protocols import Attend, State


class SandwichBlock(nnx.Module):
    """Attention and MLP, each normalised before and after, then added to the residual stream."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(f"{path}.{name}", config.hidden_size, config, weights)

        self.attn_norm = norm("attn_norm")
        self.attn = Attention(f"{path}.attn", config, weights)
        self.attn_post_norm = norm("attn_post_norm")
        self.mlp_norm = norm("mlp_norm")
        self.mlp = GatedMLP(f"{path}.mlp", config, weights)
        self.mlp_post_norm = norm("mlp_post_norm")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T 1 H2"],
        layer: int,
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Runs the layer; arguments and results as `Attention.__call__`, on the residual."""
        update, state = self.attn(self.attn_norm(x), angles, layer, attend, state)
        x = x + self.attn_post_norm(update)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), state


class Gemma(Decoder):
    """Gemma 2 and 3; the first Gemma has the plain blocks of `Llama`."""

    block = SandwichBlock
