"""Eviction of one layer's slots: brought in order, scored and compacted in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masked_eviction import compact
from pallas_kernels.quantized import QuantArray, dequantize
from pallas_kernels.window_scores import output_factor
from restkv_jax.compression import compact_carried, keep
from restkv_jax.layer import LayerInputs
from restkv_jax.plan import DecodeEviction
from restkv_jax.protocols import LayerSpec, Projection
from restkv_jax.rerotation import rerotate
from restkv_jax.slots import LayerSlots, LayerStack


def evict_rows(
    stack: LayerStack,
    *,
    row: int | Array,
    full: Bool[Array, " B"],
    q: Float[Array, "B N W H"],
    position: Int[Array, " B"],
    w_o: Float[Array, "N H D"] | Projection,
    eviction: DecodeEviction,
    spec: LayerSpec,
    layer: int | Array,
    num_layers: int,
    by_slot: bool = False,
) -> LayerStack:
    """Brings one layer down to the budget in those rows of the batch that are full.

    Args:
        stack: the layer's stack.
        row: the layer's row there.
        full: True for the rows of the batch to evict.
        q: the last queries, in order.
        position: position of the next token.
        w_o: the layer's output projection.
        eviction: policy and budget.
        spec: of the layer.
        layer: index of the layer.
        num_layers: layers of the model.
        by_slot: keys are turned to their new slots, see `CachePlan.rope`.
    """
    slots = stack.layer(row)
    ordered, order = in_order(slots)
    inputs = cache_inputs(ordered, stack.heads, q, position, w_o, spec, layer, num_layers)
    # Empty columns come first, and so the entries that stay are in order of position.
    (k, v, positions, columns), carried = keep(
        eviction.policy,
        inputs,
        ordered.k,
        ordered.v,
        capacity=min(eviction.budget, stack.size(row)),
    )
    if by_slot:
        assert spec.rotary is not None
        assert not isinstance(k, QuantArray)  # refused by the plan
        shift = jnp.arange(columns.shape[-1]) - compact(order, columns)
        k = rerotate(k, shift, spec.rotary)
    kept = LayerSlots(k=k, v=v, positions=positions, owners=None, carried=carried)
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
    return dataclasses.replace(stack, used=used)


def in_order(slots: LayerSlots) -> tuple[LayerSlots, Int[Array, "B J S"]]:
    """A cache's entries in order of position, the empty slots first, and where each was."""
    order = jnp.argsort(slots.positions, axis=-1)
    entries = slots.k, slots.v, slots.positions
    k, v, positions = jax.tree.map(lambda x: compact(x, order), entries)
    carried = None if slots.carried is None else compact_carried(slots.carried, order)
    return LayerSlots(k=k, v=v, positions=positions, owners=None, carried=carried), order


def cache_inputs(
    slots: LayerSlots,
    heads: int,
    q: Float[Array, "B N W H"],
    position: Int[Array, " B"],
    w_o: Array | Projection,
    spec: LayerSpec,
    layer: int | Array,
    num_layers: int,
) -> LayerInputs:
    """A cache's slots as a policy sees them.

    Args:
        slots: of one layer, in order.
        heads: sets of entries that it keeps.
        q: the last queries, in order.
        position: of the next token.
        w_o: the layer's output projection.
        spec: of the layer.
        layer: index of the layer.
        num_layers: layers of the model.
    """
    if not isinstance(w_o, Projection):
        w_o = Projection(w_o=w_o, factor=output_factor(w_o))
    k, v = (
        dequantize(x, jnp.float32) if isinstance(x, QuantArray) else x for x in (slots.k, slots.v)
    )
    return LayerInputs(
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
        cached_positions=slots.positions,
        carried=slots.carried,
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
