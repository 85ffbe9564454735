"""The paper's ablations: indicator x temporal x spatial smoothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import WindowPolicy, require_choice
from restkv_jax.policies.restkv import RestKV
from restkv_jax.policies.snapkv import SnapKV
from restkv_jax.smoothing import Temporal, average_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(WindowPolicy):
    """ReST-KV with one part exchanged.

    Attributes:
        indicator: "attn" is SnapKV's sum of weights, "attn-v" that sum times ‖v‖ (both pooled by
            averages and without temporal smoothing), "reconstruction" the released form.
        temporal: of the reconstruction.
        spatial: of the reconstruction.
        kernel: pooling width, odd.
    """

    name: ClassVar[str] = "ablation"
    scores_by_budget: ClassVar[bool] = True

    indicator: Literal["attn", "attn-v", "reconstruction"] = "reconstruction"
    temporal: Temporal = "ema"
    spatial: Literal["adaptive", "avgpool", "maxpool", "none"] = "adaptive"
    kernel: int = 5

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        require_choice("indicator", self.indicator, ("attn", "attn-v", "reconstruction"))
        self._restkv()

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """The indicator's scores, pooled."""
        if self.indicator == "reconstruction":
            return self._restkv().past_scores(layer, capacity, budget)
        if self.indicator == "attn":
            snapkv = SnapKV(
                window=self.window, recent=self.recent, sinks=self.sinks, kernel=self.kernel
            )
            return snapkv.past_scores(layer, capacity, budget)
        past = self.past_columns(layer)
        received = layer.once(  # the same for all budgets
            (self.name, self.window, past),
            lambda: layer.window_scores(
                self.window, jnp.ones(self.window, jnp.float32), kind="attention", past=past
            ),
        )
        length = jnp.linalg.norm(layer.v[:, :, :past].astype(jnp.float32), axis=-1)
        scores = received * layer.by_query_head(length)
        return average_pool(scores, self.poolable(layer), self.kernel)

    def _restkv(self) -> RestKV:
        return RestKV(
            window=self.window,
            recent=self.recent,
            sinks=self.sinks,
            granularity=self.granularity,
            group_reduce=self.group_reduce,
            temporal=self.temporal,
            spatial=self.spatial,
            kernel=self.kernel,
        )
