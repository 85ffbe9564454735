"""Random eviction: the floor that every score has to beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import TokenPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(TokenPolicy):
    """A uniform number for each layer, head and position: the same whenever it is asked for.

    Attributes:
        seed: of the numbers.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B K T"]:
        """U[0, 1) by layer, position and head; padding does not shift it."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer.index)
        shape = (*layer.k.shape[:2], layer.columns)
        positions = jnp.broadcast_to(jnp.maximum(layer.positions, 0), shape)
        heads = layer.first_kv_head + jnp.arange(shape[1], dtype=jnp.int32)
        heads = jnp.broadcast_to(heads[:, None], shape)

        def draw(position: Array, head: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, position), head)
            return jax.random.uniform(own, dtype=jnp.float32)

        return jax.vmap(draw)(positions.ravel(), heads.ravel()).reshape(shape)
