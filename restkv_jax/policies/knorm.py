"""Knorm: keep the keys of smallest norm (Devoto et al., arXiv 2406.11430)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import TokenPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(TokenPolicy):
    """-‖k‖: short keys tend to receive much attention. Looks at no query at all."""

    name: ClassVar[str] = "knorm"

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B K T"]:
        """-‖k_n‖."""
        return -jnp.linalg.norm(layer.k.astype(jnp.float32), axis=-1)
