"""H2O: attention that each position receives from all queries (Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import window_attention
from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import ALL_QUERIES, WindowPolicy

# Queries whose weights are alive at once, times T keys.
BLOCK = 128


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
        causal_from = layer.columns - self.window if self.released else 0
        return layer.once(
            (self.name, causal_from), lambda: received_attention(layer, causal_from=causal_from)
        )


def received_attention(layer: LayerInputs, *, causal_from: int = 0) -> Float[Array, "B N T"]:
    """Column sums of the attention matrix, a block of queries at a time: never T x T.

    Args:
        layer: a layer with all of its queries.
        causal_from: first column whose query does not see the future; 0 is causal attention.
    """
    spec, columns = layer.spec, layer.columns
    batch, _, _, size = layer.q.shape
    block = min(BLOCK, columns)
    blocks = -(-columns // block)
    q = jnp.pad(layer.q, ((0, 0), (0, 0), (0, blocks * block - columns), (0, 0)))
    q = q.reshape(batch, spec.num_kv_heads, spec.group_size, blocks, block, size)
    q = q.transpose(1, 3, 0, 2, 4, 5)  # heads and blocks in front, to loop over
    first = columns - layer.lengths[:, None, None]

    def head(args: tuple[Array, Array]) -> Array:
        q_blocks, k = args

        def add(total: Array, args: tuple[Array, Array]) -> tuple[Array, None]:
            i, rows = args
            query = i * block + jnp.arange(block)[:, None]
            distance = query - jnp.arange(columns)
            seen = (distance >= 0) | (query < causal_from)
            if spec.window is not None:
                seen &= distance < spec.window
            # Queries of padding, before the row or after the last block's end, give nothing.
            asked = (query >= first) & (query < columns)
            weights = window_attention(
                rows,
                k[:, None],
                (seen & asked & layer.valid)[:, None],
                scale=spec.scale,
                softcap=spec.softcap,
            )
            return total + jnp.sum(weights, axis=2), None

        start = jnp.zeros((batch, spec.group_size, columns), jnp.float32)
        return jax.lax.scan(add, start, (jnp.arange(blocks), q_blocks))[0]

    sums = jax.lax.map(head, (q, jnp.moveaxis(layer.k, 1, 0)))
    return jnp.moveaxis(sums, 0, 1).reshape(batch, spec.num_heads, columns)
