"""The Llama architecture, which Mistral, Qwen2 and Qwen3 vary only by configuration."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, GatedMLP, RMSNorm, Weights
from restkv_jax.protocols import Attend, State


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        self.attn_norm = RMSNorm(f"{path}.attn_norm", config.hidden_size, config, weights)
        self.attn = Attention(f"{path}.attn", config, weights)
        self.mlp_norm = RMSNorm(f"{path}.mlp_norm", config.hidden_size, config, weights)
        self.mlp = GatedMLP(f"{path}.mlp", config, weights)

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
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), state


class Llama(Decoder):
    """Blocks of the plain kind; see `models.decoder.Decoder`."""

    block = Block
