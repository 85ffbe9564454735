"""ReST-KV: keep what the layer's output could not be rebuilt without (An et al., 2605.08840)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import aggregated_reconstruction, over_queries
from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import WindowPolicy, require, require_choice
from restkv_jax.smoothing import (
    Temporal,
    adaptive_pool,
    adaptive_window,
    attention_drift,
    average_pool,
    max_pool,
    temporal_weights,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestKV(WindowPolicy):
    """Reconstruction error of the layer's output, smoothed over time and space.

    The defaults are the released code's headline setting (`released()`); `paper()` is the form
    that the paper's equations state, `robust()` a setting of this library's own.

    Attributes:
        form: "after" averages the window's attention first and scores once; "before" scores
            every query (Eq. 7) and averages the scores.
        temporal: how the window's queries are averaged, see `smoothing.temporal_weights`; "max"
            takes each key's largest score instead, form "before" only.
        alpha: weight of the newest query in the moving average.
        tau: exponent of the distance, form "after" only.
        relative: divide by the norm of the output, form "before" only.
        project: measure distances after the output projection W_O.
        spatial: "adaptive", "avgpool", "maxpool" or "none". "adaptive" compares the older half of
            the window with the newer one, and so needs two queries.
        kernel: pooling width, odd; the least width of the adaptive window.
        scale: positions of drift that widen the adaptive window by two.
        carry_over: while decoding, the moving average goes on from the last eviction's instead of
            starting with the oldest query of the window; form "after" and temporal "ema" only.
    """

    name: ClassVar[str] = "restkv"
    scores_by_budget: ClassVar[bool] = True

    form: Literal["after", "before"] = "after"
    temporal: Temporal | Literal["max"] = "ema"
    alpha: float = 0.3
    tau: float = 1.0
    relative: bool = False
    project: bool = True
    spatial: Literal["adaptive", "avgpool", "maxpool", "none"] = "adaptive"
    kernel: int = 5
    scale: float = 2000.0
    carry_over: bool = False

    @classmethod
    def released(cls, **options: object) -> RestKV:
        """The released code's headline setting: attention averaged first, then odds x distance."""
        return cls(**{"form": "after", **options})  # type: ignore[arg-type]

    @classmethod
    def paper(cls, **options: object) -> RestKV:
        """The paper's equations: Eq. 7 for every query, then the moving average."""
        return cls(**{"form": "before", **options})  # type: ignore[arg-type]

    @classmethod
    def robust(cls, **options: object) -> RestKV:
        """The released score, sinks kept aside, few tokens forced, a wide average over positions.

        A wide window smears the score of the attention sink over its neighbours, which then take
        the place of tokens that matter; keeping the sinks out of the average is what allows it.
        All 32 queries score, but 12 tokens alone are kept in any case: at small budgets the slots
        of the other 20 do more elsewhere (`experiments/FINDINGS.md`).
        """
        robust = {"form": "after", "sinks": 4, "recent": 12, "spatial": "avgpool", "kernel": 21}
        return cls(**{**robust, **options})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        WindowPolicy.__post_init__(self)
        require_choice("form", self.form, ("after", "before"))
        kinds = ("ema", "mean", "inverse_ema", "last", "max")
        require_choice("temporal", self.temporal, kinds)
        require_choice("spatial", self.spatial, ("adaptive", "avgpool", "maxpool", "none"))
        enough = self.window >= 2 or self.spatial != "adaptive"
        require(enough, "window", 'at least 2 with spatial "adaptive"', self.window)
        require(0.0 < self.alpha <= 1.0, "alpha", "a number within (0, 1]", self.alpha)
        require(self.tau > 0.0, "tau", "a positive number", self.tau)
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)
        require(self.scale > 0.0, "scale", "a positive number", self.scale)
        require(self.form == "after" or self.tau == 1.0, "tau", '1 with form "before"', self.tau)
        require(
            self.form == "before" or not self.relative,
            "relative",
            'False with form "after"',
            self.relative,
        )
        require(
            self.form == "before" or self.temporal != "max",
            "temporal",
            'another than "max" with form "after"',
            self.temporal,
        )
        require(
            not self.carry_over or (self.form, self.temporal) == ("after", "ema"),
            "carry_over",
            'False unless form is "after" and temporal "ema"',
            self.carry_over,
        )

    @property
    def carries(self) -> bool:
        """Whether the moving average goes on."""
        return self.carry_over

    def carry(self, layer: LayerInputs) -> Float[Array, "B N T"] | None:
        """The averaged attention; entries of the window start anew, as their rows are not full."""
        if not self.carry_over:
            return None
        averaged, _ = self._averaged(layer, layer.window_weights(self.window))
        inside = jnp.arange(layer.columns) >= layer.columns - self.window
        return jnp.where(inside, -1.0, averaged[..., : layer.columns])

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Reconstruction errors, pooled over neighbouring positions."""
        del capacity
        weights = layer.window_weights(self.window)
        # The same for all settings of the spatial smoothing, and for all budgets.
        error = (self.form, self.window, self.temporal, self.alpha, self.tau, self.relative)
        key = (self.name, *error, self.project, self.carry_over, self.past_columns(layer))
        scores = layer.once(key, lambda: self._reconstruction(layer, weights))
        if self.spatial == "none":
            return scores
        if self.spatial == "adaptive":
            return self._adaptive(layer, scores, budget)
        pool = average_pool if self.spatial == "avgpool" else max_pool
        return pool(scores, self.poolable(layer), self.kernel)

    def _reconstruction(
        self, layer: LayerInputs, weights: Float[Array, "B N W T"]
    ) -> Float[Array, "B N P"]:
        factor = layer.distance_factor(project=self.project)
        past = self.past_columns(layer)
        rows = None
        if self.temporal != "max":
            rows = temporal_weights(self.temporal, self.window, self.alpha)
        if self.form == "before":
            return layer.window_scores(
                self.window,
                rows,
                kind="per_query",
                past=past,
                factor=factor,
                relative=self.relative,
            )
        tau = self.tau if self.project else 1.0
        if not self.carry_over or layer.carried is None:
            return layer.window_scores(
                self.window, rows, kind="aggregated", past=past, factor=factor, tau=tau
            )
        averaged, missing = self._averaged(layer, weights)
        return aggregated_reconstruction(
            averaged,
            layer.seen_values,
            factor,
            window=weights.shape[-1] - past,
            tau=tau,
            missing=missing,
        )

    def _averaged(
        self, layer: LayerInputs, weights: Float[Array, "B N W T"]
    ) -> tuple[Float[Array, "B N T"], Float[Array, "B N"]]:
        """The moving average, and what it lacks of 1.

        Queries before the row's start lack all they weigh, and an average that goes on what it
        held of keys that are evicted since.
        """
        assert self.temporal != "max"
        rows = temporal_weights(self.temporal, self.window, self.alpha)
        before = jnp.where(layer.query_positions(self.window) < 0, rows, 0.0)
        averaged = over_queries(weights, rows)
        missing = jnp.broadcast_to(jnp.sum(before, axis=-1)[:, None], averaged.shape[:2])
        if not self.carry_over or layer.carried is None:
            return averaged, missing
        # acc <- row_0 becomes acc <- alpha · row_0 + (1 - alpha) · carried.
        step = (1.0 - self.alpha) ** self.window * (layer.carried - weights[:, :, 0])
        step = jnp.where(layer.carried >= 0.0, step, 0.0)
        return averaged + step, missing - jnp.sum(step, axis=-1)

    def _adaptive(
        self,
        layer: LayerInputs,
        scores: Float[Array, "B N P"],
        budget: Int[Array, " B"],
    ) -> Float[Array, "B N P"]:
        counts = budget.clip(1, layer.columns)
        drift = layer.of_window_weights(
            self.window, lambda weights: attention_drift(weights[..., : layer.columns], counts)
        )
        kernels, shifts = adaptive_window(drift, kernel=self.kernel, scale=self.scale)
        most = int(layer.columns // self.scale)  # |drift| < T bounds both, statically
        first = (layer.columns - layer.filled + self.sinks).clip(0, scores.shape[-1] - 1)
        return adaptive_pool(
            scores,
            layer.by_query_head(first),
            kernels,
            shifts,
            max_kernel=max(self.kernel, 2 * most + 1),
            max_shift=most + 1,
        )
