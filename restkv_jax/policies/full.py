"""Keep everything: the baseline that every other policy is measured against."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The whole prompt stays in the cache."""

    name: ClassVar[str] = "full"
    needs_budget: ClassVar[bool] = False

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B K T"]:
        """Every token is pinned."""
        del capacity, budget
        shape = (layer.k.shape[0], layer.k.shape[1], layer.columns)
        return jnp.broadcast_to(jnp.where(layer.valid, jnp.float32(jnp.inf), -jnp.inf), shape)

    def select(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Int[Array, "B K C"]:
        """The valid columns, moved to the front: nothing to sort."""
        del budget
        columns = layer.columns - layer.filled[..., None] + jnp.arange(capacity, dtype=jnp.int32)
        columns = jnp.where(columns < layer.columns, columns, -1)
        return jnp.broadcast_to(columns, (*layer.k.shape[:2], capacity))
