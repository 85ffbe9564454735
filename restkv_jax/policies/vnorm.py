"""VNorm: keep the values of largest norm behind the output projection; looks at no query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import TokenPolicy, require
from restkv_jax.smoothing import average_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class VNorm(TokenPolicy):
    """‖v W_O‖₂, the mean over a group's query heads, averaged over neighbouring positions.

    How much a token can write at all, whatever is asked later: for contexts that are compressed
    before the questions are known, best with budgets by head (`calibrate_head_budgets`). Our own.

    Attributes:
        sinks: as for all policies by token; they stay out of the average.
        recent: likewise, but averaged over.
        kernel: pooling width, odd.
    """

    name: ClassVar[str] = "vnorm"

    sinks: int = 4
    recent: int = 12
    kernel: int = 21

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        TokenPolicy.__post_init__(self)
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)

    def token_scores(self, layer: LayerInputs) -> Float[Array, "B K T"]:
        """mean_g ‖v_n W_O^g‖, pooled."""
        norms = layer.once("projected_norm", lambda: projected_norm(layer))
        return average_pool(norms, layer.positions >= self.sinks, self.kernel)


def projected_norm(layer: LayerInputs) -> Float[Array, "B K T"]:
    """‖v R‖ = ‖v W_O‖, the mean over the query heads of each key/value head."""
    groups = layer.factor.reshape(layer.spec.num_kv_heads, -1, *layer.factor.shape[1:])

    def head(args: tuple[Array, Array]) -> Array:
        factors, values = args  # [G, H, R], [B, T, H]
        projected = jnp.einsum("bth,ghr->gbtr", values.astype(jnp.float32), factors)
        return jnp.mean(jnp.linalg.norm(projected, axis=-1), axis=0)

    by_head = jax.lax.map(head, (groups, jnp.moveaxis(layer.v, 1, 0)))
    return jnp.moveaxis(by_head, 0, 1)
