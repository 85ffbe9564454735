"""CAOTE: the error of the attention output when a token goes (Goel et al., arXiv 2504.14051)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import aggregated_reconstruction
from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import WindowPolicy, require, require_choice
from restkv_jax.smoothing import Temporal, temporal_weights

# 1 - α of a float32 α below 1 is at least about this.
_LEAST_REST = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True)
class CAOTE(WindowPolicy):
    """α / (1 - α) · ‖Σ α v - v‖, of attention weights that are normalised over the past.

    ReST-KV's released form without the output projection and the smoothing, and with weights that
    sum to 1 over the tokens that may go; both call the same equation.

    Attributes:
        temporal: how the window's queries are averaged into α.
        alpha: weight of the newest query in a moving average.
        fast: measure the distance from the mean value instead of the attention output.
    """

    name: ClassVar[str] = "caote"

    temporal: Temporal = "mean"
    alpha: float = 0.3
    fast: bool = False

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        WindowPolicy.__post_init__(self)
        require_choice("temporal", self.temporal, ("ema", "mean", "inverse_ema", "last"))
        require(0.0 < self.alpha <= 1.0, "alpha", "a number within (0, 1]", self.alpha)

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Odds times distance of the normalised weights."""
        del capacity, budget
        past = self.past_columns(layer)
        rows = temporal_weights(self.temporal, self.window, self.alpha)
        weights = layer.window_scores(self.window, rows, kind="attention", past=past)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights /= jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        if self.fast:
            distance = layer.by_query_head(distance_from_mean(layer, past))
            return weights / jnp.maximum(1.0 - weights, _LEAST_REST) * distance
        return aggregated_reconstruction(
            jnp.pad(weights, ((0, 0), (0, 0), (0, layer.columns - past))),
            layer.v,
            layer.distance_factor(project=False),
            window=layer.columns - past,
        )


def distance_from_mean(layer: LayerInputs, past: int) -> Float[Array, "B K P"]:
    """‖mean(v) - v_n‖ over the tokens among the first `past` columns."""
    valid = layer.valid[:, :, :past, None]
    values = jnp.where(valid, layer.v[:, :, :past].astype(jnp.float32), 0.0)
    count = jnp.maximum(jnp.sum(valid, axis=2, keepdims=True), 1)
    return jnp.linalg.norm(jnp.sum(values, axis=2, keepdims=True) / count - values, axis=-1)
