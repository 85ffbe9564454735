"""Eviction from a cache that is full: its slots are scored and compacted in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import bits
from pallas_kernels.masked_eviction import compact
from pallas_kernels.quantized import QuantArray, dequantize
from pallas_kernels.varying import vary_like
from pallas_kernels.window_scores import output_factor
from restkv_jax.cache import KVCache
from restkv_jax.compression import compact_carried, keep
from restkv_jax.layer import LayerInputs
from restkv_jax.plan import DecodeEviction
from restkv_jax.protocols import CausalLM, LayerSpec, Projection
from restkv_jax.rerotation import rerotate
from restkv_jax.sharding import ShardedLM
from restkv_jax.slots import LayerSlots, LayerStack

Tree = TypeVar("Tree")
_State = tuple[Int[Array, " B"], Int[Array, " B"], KVCache]
# Which rows are full: those in which new tokens would not fit, or which have left the budget.
When = Literal["before", "after"]


def evict_full(
    model: CausalLM, cache: KVCache, count: Int[Array, " B"], position: Int[Array, " B"], when: When
) -> KVCache:
    """Brings rows that are full down to the budget, in all layers that keep all of their past.

    Nothing is computed while no row is, which is decided once for all layers: on GPU, a host waits
    for each decision. Devices that split the rows ask each other for one bit then; where some row
    is full, each of them evicts only if one of its own is.

    The model runs on nothing, as only it knows its output projections; what it computes besides
    them is used by nobody, and left out by XLA.

    Args:
        model: see `CausalLM`.
        cache: one that evicts while decoding.
        count: tokens that are to come, or have come.
        position: position of the next token; the last queries are those before it.
        when: "before" evicts rows in which `count` tokens do not fit, "after" those which hold more
            than the budget.
    """
    specs, eviction, on_mesh = model.layer_specs, cache.eviction, isinstance(model, ShardedLM)
    assert eviction is not None

    def full(used: Array, sizes: int | Array, count: Array) -> Bool[Array, "*L B"]:
        if when == "after":
            return used > eviction.budget
        return (count > 0) & (used + count > sizes)

    def attend(
        layer: int | Array,
        q: Float[Array, "B T N H"],
        _k: Array,
        _v: Array,
        w_o: Float[Array, "N H D"] | Projection,
        state: _State,
    ) -> tuple[Float[Array, "B T N H"], _State]:
        count, position, cache = state
        spec = specs[layer if isinstance(layer, int) else 0].share(q.shape[2])
        if spec.window is None:
            index, row = cache.place(layer)
            stack = cache.stacks[index]
            rows = full(stack.used[row], stack.size(row), count)
            evict = functools.partial(
                evict_rows,
                row=row,
                full=rows,
                q=stack.last_queries(row, position),
                position=position,
                w_o=w_o,
                eviction=eviction,
                spec=spec,
                layer=layer,
                num_layers=len(specs),
                by_slot=cache.by_slot,
            )
            # Queries stay out of loops, which would copy what they only read. One layer after the
            # other, as scores of many at once take memory.
            bare = jax.lax.optimization_barrier(dataclasses.replace(stack, queries=None))
            bare = _once(jnp.any(rows), evict, bare) if on_mesh else evict(bare)
            stack = dataclasses.replace(bare, queries=stack.queries)
            cache = cache.with_stack(index, stack)
        return jnp.zeros_like(q), (count, position, cache)

    queries = [stack.queries for stack in cache.stacks]
    nothing = jnp.zeros((count.shape[0], 1), jnp.int32)

    def evict_layers(cache: KVCache) -> KVCache:
        cache = _with_queries(cache, queries)
        _, (_, _, cache) = model(nothing, nothing, attend, (count, position, cache))
        return _with_queries(cache, [None] * len(queries))

    needed = [
        jnp.any(full(stack.used, jnp.asarray(stack.sizes)[:, None], count))
        for stack in cache.stacks
        if not stack.ring
    ]
    if not needed:
        return cache
    cache = _with_queries(cache, [None] * len(queries))
    cache = _once(functools.reduce(jnp.logical_or, needed), evict_layers, cache)
    return _with_queries(cache, queries)


def _once(needed: Bool[Array, ""], change: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """`change(tree)` if it is needed, else `tree`.

    It is a conditional in the form of a loop that runs once or not at all: through a conditional
    XLA copies what is passed, through a loop it updates it in place.
    """

    def run(state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        return vary_like(jnp.zeros((), bool), state[0]), change(state[1])

    return bits.while_loop(lambda state: state[0], run, (needed, tree))[1]


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


def _with_queries(cache: KVCache, queries: Sequence[Array | None]) -> KVCache:
    stacks = zip(cache.stacks, queries, strict=True)
    return dataclasses.replace(
        cache, stacks=tuple(dataclasses.replace(stack, queries=own) for stack, own in stacks)
    )


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
