"""A decoder-only network around the blocks of its family."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from models.config import ModelConfig
from models.int8_weights import as_stored
from models.layers import Linear, RMSNorm, Weights
from models.matmul import lookup, matmul
from models.rope import rope_angles
from models.token_blocks import by_tokens
from pallas_kernels.quantized import QuantArray
from restkv_jax.protocols import Attend, LayerSpec, State


class Block(Protocol):
    """A layer: from the residual stream to the residual stream."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None: ...

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T 1 H2"],
        layer: int,
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Arguments and results as of `models.llama.Block`."""
        ...


class Decoder(nnx.Module):
    """A `restkv_jax.protocols.CausalLM`: an immutable pytree of weights.

    Families derive from it and say what their blocks are.

    Args:
        config: shape and arithmetic.
        weights: where each parameter comes from; also decides the dtype of the activations.
    """

    block: ClassVar[type[Block]]

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embed: nnx.Param[Any] = nnx.Param(
            weights("embed.w", (config.vocab_size, config.hidden_size))
        )
        self.layers = nnx.List(
            [self.block(f"layers.{layer}", config, weights) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm("norm", config.hidden_size, config, weights)
        self.head = (
            None
            if config.tied_embeddings
            else Linear("head", config.hidden_size, config.vocab_size, weights)
        )

    @classmethod
    def init(cls, config: ModelConfig, *, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a model with random weights, scaled so that activations stay near 1.

        Args:
            config: shape and arithmetic.
            seed: equal seeds give equal weights.
            dtype: of the weights; int8 of matrices, beside which all else is bfloat16.

        Returns:
            The model.
        """
        key = jax.random.key(seed)

        def weights(path: str, shape: tuple[int, ...]) -> jax.Array | QuantArray:
            if len(shape) == 1:
                is_scale = path.endswith("norm.w") and not config.unit_offset
                return as_stored(path, jnp.full(shape, 1.0 if is_scale else 0.0), dtype)
            # A key per path, so that a parameter does not depend on which others exist.
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            fan_in = shape[-1] if path == "embed.w" else shape[0]
            return as_stored(path, jax.random.normal(own_key, shape) * fan_in**-0.5, dtype)

        return cls(config, weights)

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One entry per layer, static."""
        return self.config.layer_specs

    @property
    def kv_dtype(self) -> DTypeLike:
        """Keys and values have the dtype of the activations, which is that of the norms."""
        return self.norm.w[...].dtype

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
        *_, result = self.stages(tokens, positions, attend, state)
        return result

    def stages(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> Iterator[tuple[Float[Array, "B T D"], State]]:
        """The residual stream after each layer, and last of all what `__call__` returns."""
        config = self.config
        x = lookup(self.embed.get_value(), tokens, self.kv_dtype)
        if config.scaled_embeddings:
            # The factor is rounded to the weights' dtype, as in training.
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        angles = local = rope_angles(config.rope, config.head_dim, positions)
        if config.local_rope is not None:
            local = rope_angles(config.local_rope, config.head_dim, positions)
        for layer, block in enumerate(self.layers):
            own = angles if config.windows[layer] is None else local
            x, state = block(x, own, layer, attend, state)
            yield x, state
        yield by_tokens(self.norm, x, over=True), state

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32, accumulated in float32 whatever the weights are."""
        if self.head is None:
            logits = matmul(hidden, self.embed.get_value(), jnp.float32, transposed=True)
        else:
            logits = matmul(hidden, self.head.w.get_value(), jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
