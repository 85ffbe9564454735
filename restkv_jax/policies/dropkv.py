"""DropKV: squared error of every query's output when a token goes (NVIDIA/kvpress#284)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import WindowPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropKV(WindowPolicy):
    """Σ_t (A_t / (1 - A_t))² ‖o_t - v‖²: Eq. 7 of ReST-KV squared, without W_O and smoothing."""

    name: ClassVar[str] = "dropkv"

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Squared errors, summed over the window's queries."""
        del capacity, budget
        return layer.window_scores(
            self.window,
            jnp.ones(self.window, jnp.float32),
            kind="per_query",
            past=self.past_columns(layer),
            factor=layer.distance_factor(project=False),
            power=2.0,
        )
