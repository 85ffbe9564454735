"""Eviction from a cache that is full: its slots are scored and compacted in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import bits
from pallas_kernels.masked_eviction import compact
from pallas_kernels.quantized import QuantArray, dequantize
from pallas_kernels.window_scores import output_factor
from restkv_jax.compression import compact_carried, select
from restkv_jax.layer import LayerInputs
from restkv_jax.plan import DecodeEviction
from restkv_jax.protocols import LayerSpec, Projection
from restkv_jax.rerotation import rerotate
from restkv_jax.slots import LayerSlots, LayerStack


def evict_rows(
    stack: LayerStack,
    row: int | Array,
    full: Bool[Array, " B"],
    position: Int[Array, " B"],
    w_o: Float[Array, "N H D"] | Projection,
    *,
    eviction: DecodeEviction,
    spec: LayerSpec,
    layer: int | Array,
    num_layers: int,
    by_slot: bool = False,
) -> LayerStack:
    """Brings one layer down to the budget in those rows of the batch that are full.

    Nothing is computed while no row is. That is a conditional in the form of a loop that runs
    once or not at all: through a conditional XLA copies what is passed, through a loop it updates
    it in place.

    Args:
        stack: the layer's stack.
        row: the layer's row there.
        full: True for the rows of the batch to evict.
        position: position of the next token; the last queries are those before it.
        w_o: the layer's output projection.
        eviction: policy and budget.
        spec: of the layer.
        layer: index of the layer.
        num_layers: layers of the model.
        by_slot: keys are turned to their new slots, see `CachePlan.rope`.
    """
    # The queries of all layers stay out of the loop, which would copy what it only reads.
    q, queries = stack.last_queries(row, position), stack.queries
    stack = dataclasses.replace(stack, queries=None)

    def evict(state: tuple[Array, LayerStack]) -> tuple[Array, LayerStack]:
        _, stack = state
        slots = stack.layer(row)
        inputs, order = cache_inputs(slots, stack.heads, q, position, w_o, spec, layer, num_layers)
        columns = select(eviction.policy, inputs, capacity=min(eviction.budget, stack.size(row)))
        kept = _compacted(slots, columns, order, eviction.policy.carry(inputs), inputs)
        if by_slot:
            assert spec.rotary is not None
            assert not isinstance(kept.k, QuantArray)  # refused by the plan
            shift = jnp.arange(columns.shape[-1]) - compact(order, columns)
            kept = kept._replace(k=rerotate(kept.k, shift, spec.rotary))
        padding = stack.size(row) - columns.shape[-1]
        held = [
            jnp.where(_like(full, old), _pad(new, padding, fill), old)
            for new, old, fill in zip(
                jax.tree.leaves(kept), jax.tree.leaves(slots), _fills(slots), strict=True
            )
        ]
        stack = stack.with_layer(row, jax.tree.unflatten(jax.tree.structure(slots), held))
        if by_slot:  # all layers go on at the same slot
            entries = jnp.full_like(position, columns.shape[-1])
        else:
            entries = jnp.max(jnp.sum(columns >= 0, axis=-1, dtype=jnp.int32), axis=-1)
        used = stack.used.at[row].set(jnp.where(full, entries, stack.used[row]))
        return jnp.zeros((), bool), dataclasses.replace(stack, used=used)

    needed: Callable[[tuple[Array, LayerStack]], Array] = lambda state: state[0]  # noqa: E731
    _, stack = bits.while_loop(needed, evict, (jnp.any(full), stack))
    return dataclasses.replace(stack, queries=queries)


def cache_inputs(
    slots: LayerSlots,
    heads: int,
    q: Float[Array, "B N W H"],
    position: Int[Array, " B"],
    w_o: Array | Projection,
    spec: LayerSpec,
    layer: int | Array,
    num_layers: int,
) -> tuple[LayerInputs, Int[Array, "B J S"]]:
    """A cache's slots as a policy sees them, in order of position with the empty ones first.

    Args:
        slots: of one layer.
        heads: sets of entries that it keeps.
        q: the last queries, in order.
        position: of the next token.
        w_o: the layer's output projection.
        spec: of the layer.
        layer: index of the layer.
        num_layers: layers of the model.

    Returns:
        The inputs, and the slot that each of their columns comes from.
    """
    if not isinstance(w_o, Projection):
        w_o = Projection(w_o=w_o, factor=output_factor(w_o))
    order = jnp.argsort(slots.positions, axis=-1)
    numbers = (
        dequantize(x, jnp.float32) if isinstance(x, QuantArray) else x for x in (slots.k, slots.v)
    )
    k, v = (compact(x, order) for x in numbers)
    inputs = LayerInputs(
        q=q,
        k=k,
        v=v,
        factor=w_o.factor,
        lengths=position,
        # Sets by query head have keys and values of their own.
        spec=dataclasses.replace(spec, num_kv_heads=heads),
        w_o=w_o.w_o,
        index=layer,
        num_layers=num_layers,
        cached_positions=compact(slots.positions, order),
        carried=None if slots.carried is None else compact_carried(slots.carried, order),
    )
    return inputs, order


def _compacted(
    slots: LayerSlots,
    columns: Int[Array, "B J C"],
    order: Int[Array, "B J S"],
    carried: Array | None,
    inputs: LayerInputs,
) -> LayerSlots:
    """The kept entries in order; int8 ones are moved as they are, not rounded again."""
    filled = columns >= 0
    source = jnp.where(filled, compact(order, columns), -1)
    k, v = (jax.tree.map(lambda x: compact(x, source), part) for part in (slots.k, slots.v))
    return LayerSlots(
        k=k,
        v=v,
        positions=jnp.where(filled, compact(inputs.positions, columns), -1),
        owners=None,
        carried=None if carried is None else compact_carried(carried, columns),
    )


def _fills(slots: LayerSlots) -> list[int]:
    # Empty slots: no position, nothing carried, and zeros for what is stored there.
    marks = jax.tree.map(lambda _: 0, slots)._replace(positions=-1)
    return jax.tree.leaves(marks._replace(carried=None if slots.carried is None else -1))


def _pad(x: Array, slots: int, fill: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, slots)
    return jnp.pad(x, widths, constant_values=fill)


def _like(rows: Bool[Array, " B"], x: Array) -> Array:
    return rows.reshape(-1, *(1,) * (x.ndim - 1))
