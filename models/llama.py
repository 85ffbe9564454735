"""The Llama architecture, which Mistral, Qwen2 and Qwen3 vary only by configuration."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, GatedMLP, RMSNorm, Weights
from models.token_blocks import by_tokens
from restkv_jax.protocols import Attend, State


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual stream.

    What a layer computes outside of `attend` is jitted, so that layers that are alike are traced
    and lowered once; XLA puts the copies back in place before it optimises.
    """

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
        """Runs the layer.

        Args:
            x: the residual stream.
            angles: rotary angles, from `rope_angles`.
            layer: index handed to `attend`.
            attend: the attention.
            state: its state, opaque.

        Returns:
            The residual stream, and the new state.
        """
        q, k, v, w_o = self._before(x, angles)
        heads, state = attend(layer, q, k, v, w_o, state)
        return self._after(x, heads), state

    @jax.jit
    def _before(
        self, x: Float[Array, "B T D"], angles: Float[Array, "B T 1 H2"]
    ) -> tuple[Array, Array, Array, Float[Array, "N H D"]]:
        def project(x: Array, angles: Array) -> tuple[Array, Array, Array]:
            return self.attn.project(self.attn_norm(x), angles)

        return *by_tokens(project, x, angles), self.attn.w_o(x.dtype)

    @jax.jit
    def _after(
        self, x: Float[Array, "B T D"], heads: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        return by_tokens(self.add, x, heads, over=True)

    def add(
        self, x: Float[Array, "B T D"], heads: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """Adds attention and MLP to the residual stream."""
        x = x + self.attn.output(heads, x.dtype)
        return x + self.mlp(self.mlp_norm(x))


class Llama(Decoder):
    """Blocks of the plain kind; see `models.decoder.Decoder`."""

    block = Block
