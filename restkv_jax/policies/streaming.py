"""StreamingLLM: attention sinks and the most recent tokens (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import Policy, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Keeps the first `sinks` tokens and fills the budget with the last ones; no scores.

    Attributes:
        sinks: tokens at the start that are always kept.
    """

    name: ClassVar[str] = "streaming"

    sinks: int = 4

    def __post_init__(self) -> None:
        """Refuses a negative number of sinks.

        Raises:
            ValueError: naming the option.
        """
        require(self.sinks >= 0, "sinks", "at least 0", self.sinks)

    @property
    def protected(self) -> int:
        """The sinks."""
        return self.sinks

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B K T"]:
        """Sinks pinned, the others by recency."""
        del capacity, budget
        positions = layer.positions
        recency = jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))
        recency = jnp.where(positions < 0, -jnp.inf, recency)
        shape = (*layer.k.shape[:2], layer.columns)
        return jnp.broadcast_to(recency, shape)

    def select(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Int[Array, "B K C"]:
        """The same set as by `importance`, in closed form."""
        kept = jnp.minimum(budget[:, None], layer.filled)[..., None]
        slot = jnp.arange(capacity, dtype=jnp.int32)
        first = layer.columns - layer.filled[..., None]
        columns = jnp.where(slot < self.sinks, first + slot, layer.columns - kept + slot)
        columns = jnp.where(slot < kept, columns, -1).astype(jnp.int32)
        return jnp.broadcast_to(columns, (*layer.k.shape[:2], capacity))
