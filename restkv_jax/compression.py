"""What a policy keeps of one layer: scores, columns, and the K/V themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction import Kept, compact, masked_eviction, select_flat, take
from pallas_kernels.quantized import QuantArray
from restkv_jax.allocation import HeadAllocation
from restkv_jax.layer import LayerInputs
from restkv_jax.policies import Policy
from restkv_jax.policies.base import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompressedLayer:
    """The K/V that one layer keeps; J heads, K or N of them by the policy's granularity.

    With budgets by head they are lists that several heads share: J lists, and C the sum of a
    list's budgets.

    Attributes:
        k: [B, J, C, H] keys in order of position.
        v: [B, J, C, H] values.
        positions: [B, J, C] each entry's position in its row, -1 for an empty slot.
        owners: [B, J, C] which of the list's heads each entry belongs to, of budgets by head; else
            None.
        carried: [B, N, C] what the policy hands on to the next eviction, or None.
    """

    k: Float[Array, "B J C H"]
    v: Float[Array, "B J C H"]
    positions: Int[Array, "B J C"]
    owners: Int[Array, "B J C"] | None = None
    carried: Float[Array, "B N C"] | None = None


def score(
    policy: Policy, layer: LayerInputs, *, capacity: int, budget: Int[Array, " B"] | None = None
) -> Float[Array, "B J T"]:
    """Importance of every column: +inf for what is always kept, -inf for padding.

    Args:
        policy: the eviction policy.
        layer: one layer's attention.
        capacity: C, static number of slots, more than the policy always keeps.
        budget: slots that each row may fill, C by default.

    Raises:
        ValueError: a capacity of fewer slots.
    """
    _check_capacity(policy, capacity)
    if budget is None:
        budget = jnp.full_like(layer.lengths, capacity)
    return policy.importance(layer, capacity, budget)


def select(
    policy: Policy, layer: LayerInputs, *, capacity: int, budget: Int[Array, " B"] | None = None
) -> Int[Array, "B J C"]:
    """Columns that stay, ascending, -1 for empty slots. Arguments and errors as in `score`."""
    _check_capacity(policy, capacity)
    if budget is None:
        budget = jnp.full_like(layer.lengths, capacity)
    kept = min(capacity, layer.columns)
    columns = policy.select(layer, kept, jnp.minimum(budget, kept))
    empty = ((0, 0), (0, 0), (0, capacity - kept))
    return jnp.pad(columns, empty, constant_values=-1)


def compress(
    policy: Policy,
    layer: LayerInputs,
    *,
    capacity: int,
    budget: Int[Array, " B"] | None = None,
    heads: HeadAllocation | None = None,
    budgets_of: int = 0,
) -> CompressedLayer:
    """Keeps what `select` chooses, or what the heads' own budgets leave them.

    Args:
        policy: the eviction policy.
        layer: one layer's attention.
        capacity: C, static number of slots of a head, on average with budgets by head; more than
            the policy always keeps.
        budget: slots a head that each row may fill, C by default.
        heads: how the slots are spread over the heads; evenly if None.
        budgets_of: static index of the layer whose budgets hold, for `heads`.

    Returns:
        The kept entries; empty slots hold zeros.

    Raises:
        ValueError: a capacity of fewer slots.
    """
    _check_capacity(policy, capacity)
    if heads is not None:
        return _compress_flat(policy, layer, capacity, budget, heads, budgets_of)
    kept, carried = keep(policy, layer, layer.k, layer.v, capacity=capacity, budget=budget)
    assert isinstance(kept.k, jax.Array)
    assert isinstance(kept.v, jax.Array)
    return CompressedLayer(k=kept.k, v=kept.v, positions=kept.positions, carried=carried)


def keep(
    policy: Policy,
    layer: LayerInputs,
    k: Float[Array, "B K T H"] | QuantArray,
    v: Float[Array, "B K T H"] | QuantArray,
    *,
    capacity: int,
    budget: Int[Array, " B"] | None = None,
) -> tuple[Kept, Float[Array, "B N C"] | None]:
    """Moves the columns that stay, in order: selecting and moving are one op where they can be.

    Args:
        policy: the eviction policy.
        layer: what it sees.
        k: the layer's keys as they are stored, and so moved.
        v: its values.
        capacity: C, static number of slots.
        budget: slots that each row may fill, C by default.

    Returns:
        The entries, and what the policy hands on of them to the next eviction, if it does.
    """
    if policy.selects_by_importance:
        most = min(capacity, layer.columns)
        slots = jnp.full_like(layer.lengths, most) if budget is None else jnp.minimum(budget, most)
        importance = policy.importance(layer, most, slots)
        kept = masked_eviction(importance, k, v, layer.positions, slots, capacity=capacity)
    else:
        columns = select(policy, layer, capacity=capacity, budget=budget)
        kept = Kept(*take(columns, k, v, layer.positions), columns)
    carried = policy.carry(layer)
    return kept, None if carried is None else compact_carried(carried, kept.columns)


def compact_carried(
    carried: Float[Array, "B N T"], columns: Int[Array, "B J C"]
) -> Float[Array, "B N C"]:
    """Gathers what each query head hands on of the columns that its set keeps; -1 if empty."""
    columns = jnp.repeat(columns, carried.shape[1] // columns.shape[1], axis=1)
    return jnp.where(columns >= 0, compact(carried, columns), -1.0)


def _check_capacity(policy: Policy, capacity: int) -> None:
    # Of slots that cannot hold what is pinned, the lowest columns would win.
    expected = f"more than the {policy.protected} slots of what {policy.name!r} always keeps"
    require(capacity > policy.protected, "capacity", expected, capacity)


def _compress_flat(
    policy: Policy,
    layer: LayerInputs,
    slots: int,
    budget: Int[Array, " B"] | None,
    heads: HeadAllocation,
    budgets_of: int,
) -> CompressedLayer:
    kept = min(slots, layer.columns)
    budget = jnp.full_like(layer.lengths, kept) if budget is None else jnp.minimum(budget, kept)
    importance = policy.importance(layer, kept, budget)
    batch, sets, columns = importance.shape
    lists = heads.lists_here(sets, layer.spec)
    capacity = heads.capacity(slots, sets // lists, budgets_of)
    counts = heads.spread(importance, budget, kept, budgets_of, layer.spec)
    owners, chosen = (
        found.reshape(batch, lists, -1)
        for found in select_flat(
            importance.reshape(batch * lists, -1, columns),
            counts.reshape(batch * lists, -1),
            capacity=capacity,
        )
    )
    filled = owners >= 0
    head = jnp.arange(lists)[:, None] * (sets // lists) + owners

    def taken(x: Array) -> Array:
        # Sets by query head read the key/value head of their group.
        source = jnp.where(filled, head // (sets // x.shape[1]) * columns + chosen, -1)
        flat = x.reshape(batch, 1, -1, *x.shape[3:])
        found = compact(flat, source.reshape(batch, 1, -1))
        return found.reshape(*source.shape, *x.shape[3:])

    shape = (batch, layer.spec.num_kv_heads, columns)
    return CompressedLayer(
        k=jnp.where(filled[..., None], taken(layer.k), 0),
        v=jnp.where(filled[..., None], taken(layer.v), 0),
        positions=jnp.where(filled, taken(jnp.broadcast_to(layer.positions, shape)), -1),
        owners=owners,
    )
