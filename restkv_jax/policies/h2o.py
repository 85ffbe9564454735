"""H2O: attention that each position receives from all queries (Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import ALL_QUERIES, WindowPolicy
from restkv_jax.received_attention import received_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(WindowPolicy):
    """Heavy hitters: the largest column sums of the whole attention matrix, and the last tokens.

    All queries are those of the prompt itself; a probe's are not counted.

    Attributes:
        released: sum what the code of the ReST-KV comparison sums: it masks the future for the
            last W queries alone, so that all the earlier ones also see what comes after them.
    """

    name: ClassVar[str] = "h2o"

    released: bool = False

    @property
    def accumulates(self) -> bool:
        """Column sums can be added up on the way, unless queries are to see the future."""
        return not self.released

    @property
    def query_rows(self) -> int:
        """Every query of the prompt."""
        return ALL_QUERIES

    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Σ_t A_t[n] over all queries t."""
        del capacity, budget
        return self.carry(layer)[..., : self.past_columns(layer)]

    def carry(self, layer: LayerInputs) -> Float[Array, "B N T"]:
        """The column sums; those of a cache were added up while it was decoded from.

        Raises:
            ValueError: the layer is a prompt that holds fewer queries than keys.
        """
        if layer.carried is not None:
            return jnp.maximum(layer.carried, 0.0)
        if layer.q.shape[2] != layer.columns:
            raise ValueError(
                f"q: h2o looks at all {layer.columns} queries, got the last {layer.q.shape[2]}"
            )
        if layer.received is not None and not self.released:
            return layer.received
        causal_from = layer.columns - self.window if self.released else 0
        # The prompt's own attention is causal: its sums are those of these weights, too.
        log_sums = None if causal_from else layer.log_sums
        return layer.once(
            (self.name, causal_from),
            lambda: received_attention(
                layer.q,
                layer.k,
                layer.lengths,
                log_sums,
                spec=layer.spec,
                causal_from=causal_from,
            ),
        )
