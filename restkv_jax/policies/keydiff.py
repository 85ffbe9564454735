"""KeyDiff: keep the keys that differ most from the average key (Park et al., arXiv 2504.15364)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import TokenPolicy

# Norms below it count as it: a key of zeros is similar to nothing.
_SHORTEST = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(TokenPolicy):
    """Minus the cosine between a key and the mean of all unit keys. Looks at no query at all."""

    name: ClassVar[str] = "keydiff"

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B K T"]:
        """-cos(k_n, mean_m k_m / ‖k_m‖)."""
        unit = _normalize(jnp.where(layer.valid[..., None], layer.k, 0))
        # The cosine asks for the anchor's direction alone: the sum of keys serves as their mean.
        anchor = _normalize(jnp.sum(unit, axis=2))
        return -jnp.einsum("bkth,bkh->bkt", unit, anchor)


def _normalize(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _SHORTEST)
