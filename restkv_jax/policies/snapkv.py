"""SnapKV: attention that the last queries pay to each position (Li et al., arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import WindowPolicy, require, require_choice
from restkv_jax.smoothing import average_pool, max_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(WindowPolicy):
    """Sum of the window's attention weights, pooled over neighbouring positions.

    Attributes:
        aggregate: over the window's queries: "sum", or "max", which a long probe needs, as each
            of its queries looks elsewhere.
        kernel: pooling width, odd.
        pooling: "avgpool" (the setting of the ReST-KV comparison) or "maxpool" (SnapKV's own).
    """

    name: ClassVar[str] = "snapkv"

    aggregate: Literal["sum", "max"] = "sum"
    kernel: int = 5
    pooling: Literal["avgpool", "maxpool"] = "avgpool"

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        WindowPolicy.__post_init__(self)
        require_choice("aggregate", self.aggregate, ("sum", "max"))
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)
        require_choice("pooling", self.pooling, ("avgpool", "maxpool"))

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Σ_t A_t[n], or max_t, pooled."""
        del capacity, budget
        rows = jnp.ones(self.window, jnp.float32) if self.aggregate == "sum" else None
        scores = layer.window_scores(
            self.window, rows, kind="attention", past=self.past_columns(layer)
        )
        pool = average_pool if self.pooling == "avgpool" else max_pool
        return pool(scores, self.poolable(layer), self.kernel)
