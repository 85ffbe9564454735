"""CriticalKV: attention first, then attention times projected values (Feng et al., 2502.03805)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction import select_slots
from restkv_jax.budget import part
from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import require
from restkv_jax.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """Two stages: a share of the budget by s, the rest by (s + ε) ‖v W_O‖₁.

    s is SnapKV's score as a mean over the window, so that ε has the scale of an attention weight.

    Attributes:
        first_stage: share of the past budget that s alone decides.
        epsilon: ε.
    """

    name: ClassVar[str] = "criticalkv"

    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        SnapKV.__post_init__(self)
        holds = 0.0 <= self.first_stage <= 1.0
        require(holds, "first_stage", "a share within [0, 1]", self.first_stage)
        require(self.epsilon >= 0.0, "epsilon", "at least 0", self.epsilon)

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """s: SnapKV's, as a mean."""
        scores = SnapKV.past_scores(self, layer, capacity, budget)
        return scores / self.window if self.aggregate == "sum" else scores

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B J T"]:
        """The first stage's choice pinned, the others by the second stage's score.

        Raises:
            ValueError: the layer holds no output projection.
        """
        if layer.w_o is None:
            raise ValueError("w_o: criticalkv needs the output projection")
        scores = SnapKV.importance(self, layer, capacity, budget)
        past_budget = jnp.maximum(budget - self.protected, 0)
        first = jnp.floor(part(past_budget, self.first_stage)).astype(budget.dtype)
        protected = jnp.minimum(budget, self.protected)
        capacity = min(capacity, layer.columns)
        chosen = select_slots(scores, capacity=capacity, budget=protected + first)
        chosen = jnp.where(chosen >= 0, chosen, layer.columns)  # out of bounds: dropped
        pinned = jnp.put_along_axis(
            jnp.zeros(scores.shape, bool), chosen, True, axis=-1, inplace=False, mode="drop"
        )
        w_o = layer.w_o
        norms = layer.once("projected_length", lambda: projected_length(layer.v, w_o))
        if self.granularity == "kv_head":
            norms = jnp.mean(norms.reshape(*layer.k.shape[:2], -1, layer.columns), axis=2)
        second = jnp.where(jnp.isfinite(scores), (scores + self.epsilon) * norms, scores)
        return jnp.where(pinned, jnp.inf, second)


def projected_length(
    v: Float[Array, "B K T H"], w_o: Float[Array, "N H D"]
) -> Float[Array, "B N T"]:
    """‖v W_O‖₁ for each query head, one head's [T, D] at a time."""
    group = w_o.shape[0] // v.shape[1]

    def head(args: tuple[Array, Array]) -> Array:
        projection, kv_head = args
        values = jnp.take(v, kv_head, axis=1)
        out = jnp.einsum("bth,hd->btd", values, projection, preferred_element_type=jnp.float32)
        return jnp.sum(jnp.abs(out), axis=-1)

    return jnp.moveaxis(jax.lax.map(head, (w_o, jnp.arange(w_o.shape[0]) // group)), 0, 1)
