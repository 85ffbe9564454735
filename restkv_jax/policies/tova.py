"""TOVA: what the last query attends to, one set for a whole layer (Oren et al., 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import TokenPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(TokenPolicy):
    """The last query's weights, averaged over all heads of the layer; every head keeps one set.

    As published nothing is forced, neither sinks nor the last token itself; `recent=1` pins that
    one. The mean over heads is the one sum across heads that a sharded layer has to communicate.
    """

    name: ClassVar[str] = "tova"

    @property
    def query_rows(self) -> int:
        """The last query."""
        return 1

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B 1 T"]:
        """mean_h A_h[last query]."""
        one = jnp.ones(1, jnp.float32)
        last = layer.window_scores(1, one, kind="attention", past=layer.columns)
        return layer.mean_over_heads(last)
