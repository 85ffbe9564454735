"""The Llama architecture, which Mistral, Qwen2 and Qwen3 vary only by configuration."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from models.config import ModelConfig
from models.layers import Attention, GatedMLP, Linear, RMSNorm, Weights
from models.rope import rope_angles
from restkv_jax.protocols import Attend, LayerSpec, State


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        self.attn_norm = RMSNorm(f"{path}.attn_norm", config.hidden_size, config.rms_eps, weights)
        self.attn = Attention(f"{path}.attn", config, weights)
        self.mlp_norm = RMSNorm(f"{path}.mlp_norm", config.hidden_size, config.rms_eps, weights)
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


class Llama(nnx.Module):
    """A `restkv_jax.protocols.CausalLM`: an immutable pytree of weights.

    Args:
        config: shape and arithmetic.
        weights: where each parameter comes from; also decides the dtype of the activations.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embed = nnx.Param(weights("embed.w", (config.vocab_size, config.hidden_size)))
        self.layers = nnx.List(
            [Block(f"layers.{layer}", config, weights) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm("norm", config.hidden_size, config.rms_eps, weights)
        self.head = (
            None
            if config.tied_embeddings
            else Linear("head", config.hidden_size, config.vocab_size, weights)
        )

    @classmethod
    def init(cls, config: ModelConfig, *, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Llama:
        """Makes a model with random weights, scaled so that activations stay near 1.

        Args:
            config: shape and arithmetic.
            seed: equal seeds give equal weights.
            dtype: of the weights.

        Returns:
            The model.
        """
        key = jax.random.key(seed)

        def weights(path: str, shape: tuple[int, ...]) -> jax.Array:
            if len(shape) == 1:
                return jnp.full(shape, 1.0 if path.endswith("norm.w") else 0.0, dtype)
            # A key per path, so that a parameter does not depend on which others exist.
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            fan_in = shape[-1] if path == "embed.w" else shape[0]
            return (jax.random.normal(own_key, shape) * fan_in**-0.5).astype(dtype)

        return cls(config, weights)

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One entry per layer, static."""
        return self.config.layer_specs

    @property
    def kv_dtype(self) -> DTypeLike:
        """Keys and values have the weights' dtype."""
        return self.embed[...].dtype

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Runs all layers, calling `attend` once in each, in order.

        Args:
            tokens: token ids.
            positions: each token's position in its own row; -1 marks padding.
            attend: the attention to use.
            state: opaque; passed to the first `attend`, each result to the next.

        Returns:
            Hidden states after the final norm, and the last state.
        """
        x = self.embed[...][tokens]
        angles = rope_angles(self.config.rope, self.config.head_dim, positions)
        for layer, block in enumerate(self.layers):
            x, state = block(x, angles, layer, attend, state)
        return self.norm(x), state

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32, accumulated in float32 whatever the weights are."""
        head = self.embed[...].T if self.head is None else self.head.w[...]
        return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
