"""What a policy keeps of one layer: scores, columns, and the K/V themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction import compact
from restkv_jax.layer import LayerInputs
from restkv_jax.policies import Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompressedLayer:
    """The K/V that one layer keeps; J heads, K or N of them by the policy's granularity.

    Attributes:
        k: [B, J, C, H] keys in order of position.
        v: [B, J, C, H] values.
        positions: [B, J, C] each entry's position in its row, -1 for an empty slot.
    """

    k: Float[Array, "B J C H"]
    v: Float[Array, "B J C H"]
    positions: Int[Array, "B J C"]


def score(
    policy: Policy, layer: LayerInputs, *, capacity: int, budget: Int[Array, " B"] | None = None
) -> Float[Array, "B J T"]:
    """Importance of every column: +inf for what is always kept, -inf for padding.

    Args:
        policy: the eviction policy.
        layer: one layer's attention.
        capacity: C, static number of slots.
        budget: slots that each row may fill, C by default.
    """
    if budget is None:
        budget = jnp.full_like(layer.lengths, capacity)
    return policy.importance(layer, capacity, budget)


def select(
    policy: Policy, layer: LayerInputs, *, capacity: int, budget: Int[Array, " B"] | None = None
) -> Int[Array, "B J C"]:
    """Columns that stay, ascending, -1 for empty slots. Arguments as in `score`."""
    if budget is None:
        budget = jnp.full_like(layer.lengths, capacity)
    kept = min(capacity, layer.columns)
    columns = policy.select(layer, kept, jnp.minimum(budget, kept))
    empty = ((0, 0), (0, 0), (0, capacity - kept))
    return jnp.pad(columns, empty, constant_values=-1)


def compress(
    policy: Policy, layer: LayerInputs, *, capacity: int, budget: Int[Array, " B"] | None = None
) -> CompressedLayer:
    """Keeps what `select` chooses. Arguments as in `score`; empty slots hold zeros."""
    columns = select(policy, layer, capacity=capacity, budget=budget)
    filled = columns >= 0
    first = (layer.columns - layer.lengths)[:, None, None]
    return CompressedLayer(
        k=jnp.where(filled[..., None], compact(layer.k, columns), 0),
        v=jnp.where(filled[..., None], compact(layer.v, columns), 0),
        positions=jnp.where(filled, columns - first, -1),
    )
