"""Expected attention of queries to come, from the statistics of those seen (arXiv 2510.00636)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import (
    Granularity,
    GroupReduce,
    TokenPolicy,
    reduce_groups,
    require,
    require_choice,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(TokenPolicy):
    """E[exp(q·k)] for Gaussian queries, normalised over the keys, times ‖v‖.

    The mean and the covariance are those of the last `rows` queries as the layer saw them,
    rotary embedding included. The published form takes them before it and averages the rotations
    of the positions that follow the prompt; those differ from the positions of the last queries
    by a shift of `rows`, and a policy knows no model's rotary embedding. A soft cap on the logits
    is left out, as the expectation has no closed form with it.

    Attributes:
        sinks: tokens at the start that are always kept; as their queries and keys are outliers,
            they take no part in the statistics nor in the normalisation.
        rows: how many of the last queries stand for those to come.
        covariance: count the spread of the queries, not only their mean.
        values: multiply by ‖v‖.
        granularity: as for policies with a window.
        group_reduce: likewise.
    """

    name: ClassVar[str] = "expected_attention"

    sinks: int = 4
    rows: int = 512
    covariance: bool = True
    values: bool = True
    granularity: Granularity = "kv_head"
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        TokenPolicy.__post_init__(self)
        require(self.rows >= 1, "rows", "at least 1", self.rows)
        require_choice("granularity", self.granularity, ("kv_head", "query_head"))
        require_choice("group_reduce", self.group_reduce, ("mean", "max"))

    @property
    def query_rows(self) -> int:
        """The queries that the statistics are taken of."""
        return self.rows

    def cache_heads(self, num_heads: int, num_kv_heads: int) -> int:
        """K or N, by granularity."""
        return num_kv_heads if self.granularity == "kv_head" else num_heads

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B J T"]:
        """softmax_n(E-logits) · ‖v_n‖."""
        logits = self._expected_logits(layer)
        counted = layer.by_query_head(layer.positions >= self.sinks)
        # Not -inf: a row of nothing but sinks has to stay a number; they are pinned in any case.
        logits = jnp.where(counted, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)
        if self.granularity == "kv_head":
            weights = reduce_groups(weights, layer.spec.num_kv_heads, self.group_reduce)
        if not self.values:
            return weights
        length = jnp.linalg.norm(layer.v.astype(jnp.float32), axis=-1)
        return weights * jnp.repeat(length, weights.shape[1] // length.shape[1], axis=1)

    def _expected_logits(self, layer: LayerInputs) -> Float[Array, "B N T"]:
        """The log of E[exp(s q·k)] for q ~ N(μ, Σ): s μ·k + s² kᵀΣk / 2, s the logits' scale."""
        q = layer.q[:, :, -self.rows :].astype(jnp.float32)
        # The last query always counts, however short the row.
        start = jnp.minimum(self.sinks, layer.lengths[:, None] - 1)
        counted = layer.query_positions(q.shape[2]) >= jnp.maximum(start, 0)
        counted = counted.astype(jnp.float32)
        share = counted / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)
        mean = jnp.einsum("bnqh,bq->bnh", q, share)
        spread = (q - mean[:, :, None]) * jnp.sqrt(share)[:, None, :, None]
        covariance = jnp.einsum("bnqh,bnqi->bnhi", spread, spread)
        scale = layer.spec.scale

        def head(args: tuple[Array, Array, Array]) -> Array:
            mu, sigma, kv_head = args  # [B, H], [B, H, H], []
            keys = scale * jnp.take(layer.k, kv_head, axis=1).astype(jnp.float32)
            logits = jnp.einsum("bth,bh->bt", keys, mu)
            if self.covariance:
                logits += 0.5 * jnp.einsum("bth,bth->bt", keys @ sigma, keys)
            return logits

        kv_heads = jnp.arange(layer.spec.num_heads) // layer.spec.group_size
        by_head = jnp.moveaxis(mean, 1, 0), jnp.moveaxis(covariance, 1, 0), kv_heads
        return jnp.moveaxis(jax.lax.map(head, by_head), 0, 1)
