"""Eviction from a cache that is full: all layers that keep their past, one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import bits
from pallas_kernels.varying import vary_like
from restkv_jax.cache import KVCache
from restkv_jax.factors import output_projections
from restkv_jax.layer_eviction import evict_rows
from restkv_jax.protocols import CausalLM, LayerSpec, Projection
from restkv_jax.sharding import ShardedLM

Tree = TypeVar("Tree")
# Tokens to come or that came, the next position, and the cache.
_State = tuple[Int[Array, " B"], Int[Array, " B"], KVCache]
_Weights = Float[Array, "N H D"] | Projection
# Which rows are full: those in which new tokens would not fit, or which have left the budget.
When = Literal["before", "after"]


def evict_full(
    model: CausalLM, cache: KVCache, count: Int[Array, " B"], position: Int[Array, " B"], when: When
) -> KVCache:
    """Brings rows that are full down to the budget, in all layers that keep all of their past.

    Nothing is computed while no row is, which is decided once for all layers: on GPU, a host waits
    for each decision. Devices that split the rows ask each other for one bit then; where some row
    is full, each of them evicts only if one of its own is.

    Layers that are alike take turns in one loop, which is compiled once, though the model's own
    loop over its layers may be unrolled. On GPU, where the policy asks for whole output
    projections, the host then also waits for each layer that is evicted, whose projection it
    chooses. That is so for those that read W_O itself, and for those that read its factor if the
    model does not hand it over, see `FactoredLM`.

    Args:
        model: see `CausalLM`.
        cache: one that evicts while decoding.
        count: tokens that are to come, or have come.
        position: position of the next token; the last queries are those before it.
        when: "before" evicts rows in which `count` tokens do not fit, "after" those which hold more
            than the budget.
    """
    on_mesh = isinstance(model, ShardedLM)
    turns = _Turns(specs=model.layer_specs, when=when, on_mesh=on_mesh)
    needed = [
        jnp.any(turns.full(cache, stack.used, jnp.asarray(stack.sizes)[:, None], count))
        for stack in cache.stacks
        if not stack.ring
    ]
    if not needed:
        return cache
    queries = _queries(cache)

    def evict_layers(cache: KVCache) -> KVCache:
        state = count, position, _with_queries(cache, queries)
        projections = output_projections(model.model if isinstance(model, ShardedLM) else model)
        if not projections:
            state = turns.in_the_models_loop(model, state)
        elif isinstance(model, ShardedLM):
            state = model.on_shards(turns.in_loops, state, projections)
        else:
            state = turns.in_loops(state, projections)
        return _with_queries(state[2], None)

    # Queries stay out of what loops carry: they would be copied, though they are only read.
    cache = _with_queries(cache, None)
    cache = _once(functools.reduce(jnp.logical_or, needed), evict_layers, cache)
    return _with_queries(cache, queries)


class _Layer(NamedTuple):
    """A layer, its stack in the cache and its row there."""

    number: int | Array
    stack: int
    row: int | Array
    spec: LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turns:
    """How all layers are evicted, one after the other.

    Attributes:
        specs: of the model's layers.
        when: see `evict_full`.
        on_mesh: whether a device evicts only if one of its own rows is full.
    """

    specs: tuple[LayerSpec, ...]
    when: When
    on_mesh: bool

    def full(
        self,
        cache: KVCache,
        used: Int[Array, "*L B"],
        sizes: int | Int[Array, "L 1"],
        count: Int[Array, " B"],
    ) -> Bool[Array, "*L B"]:
        """Which rows are, by their cursors."""
        assert cache.eviction is not None
        if self.when == "after":
            return used > cache.eviction.budget
        return (count > 0) & (used + count > sizes)

    def in_loops(self, state: _State, projections: Sequence[_Weights]) -> _State:
        """A loop over each set of layers that are alike.

        Args:
            state: see `_State`; of one device, if there are several.
            projections: of every layer.
        """
        count, position, cache = state
        queries = _queries(cache)
        for layers, weights in _alike(cache, self.specs, projections):
            evict = functools.partial(self._evict_one_of, layers, _chooser(weights))

            def step(
                cache: KVCache,
                i: Int[Array, ""],
                evict: Callable[[Int[Array, ""], _State], _State] = evict,
            ) -> tuple[KVCache, None]:
                _, _, cache = evict(i, (count, position, _with_queries(cache, queries)))
                return _with_queries(cache, None), None

            # One set after the other, as scores of many layers at once take memory.
            cache = jax.lax.optimization_barrier(_with_queries(cache, None))
            cache, _ = bits.scan(step, cache, jnp.arange(len(layers), dtype=jnp.int32))
            cache = _with_queries(cache, queries)
        return count, position, cache

    def in_the_models_loop(self, model: CausalLM, state: _State) -> _State:
        """For a model that scans over layers, which are all alike.

        It runs on nothing, as only it knows its output projections; what it computes besides them
        is used by nobody, and left out by XLA.
        """

        def attend(
            number: int | Array,
            q: Float[Array, "B T N H"],
            _k: Array,
            _v: Array,
            w_o: _Weights,
            state: _State,
        ) -> tuple[Float[Array, "B T N H"], _State]:
            layer = _Layer(number, *state[2].place(number), self.specs[0])
            return jnp.zeros_like(q), self._evict(layer, w_o, state)

        nothing = jnp.zeros((state[0].shape[0], 1), jnp.int32)
        return model(nothing, nothing, attend, state)[1]

    def _evict_one_of(
        self,
        layers: Sequence[_Layer],
        projection: Callable[[Int[Array, ""]], _Weights],
        i: Int[Array, ""],
        state: _State,
    ) -> _State:
        layer = layers[0]
        if len(layers) > 1:
            numbers = jnp.asarray([(layer.number, layer.row) for layer in layers], jnp.int32)
            layer = layer._replace(number=numbers[i, 0], row=numbers[i, 1])
        return self._evict(layer, projection(i), state)

    def _evict(self, layer: _Layer, w_o: _Weights, state: _State) -> _State:
        count, position, cache = state
        assert cache.eviction is not None
        stack = cache.stacks[layer.stack]
        rows = self.full(cache, stack.used[layer.row], stack.size(layer.row), count)
        heads = (w_o.w_o if isinstance(w_o, Projection) else w_o).shape[0]
        evict = functools.partial(
            evict_rows,
            row=layer.row,
            full=rows,
            q=stack.last_queries(layer.row, position),
            position=position,
            w_o=w_o,
            eviction=cache.eviction,
            spec=layer.spec.share(heads),
            layer=layer.number,
            num_layers=len(self.specs),
            by_slot=cache.by_slot,
        )
        bare = dataclasses.replace(stack, queries=None)
        bare = _once(jnp.any(rows), evict, bare) if self.on_mesh else evict(bare)
        stack = dataclasses.replace(bare, queries=stack.queries)
        return count, position, cache.with_stack(layer.stack, stack)


def _alike(
    cache: KVCache, specs: Sequence[LayerSpec], projections: Sequence[_Weights]
) -> list[tuple[list[_Layer], list[_Weights]]]:
    """Layers that are evicted, and their output projections, those together that are alike."""
    found: dict[object, tuple[list[_Layer], list[_Weights]]] = {}
    for number, (spec, w_o) in enumerate(zip(specs, projections, strict=True)):
        if spec.window is not None:
            continue
        stack, row = cache.rows[number]
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(w_o))
        # A row that is not static needs layers of one size.
        alone = row if len(set(cache.stacks[stack].sizes)) > 1 else None
        layers, weights = found.setdefault((stack, spec, shapes, alone), ([], []))
        layers.append(_Layer(number, stack, row, spec))
        weights.append(w_o)
    return list(found.values())


def _chooser(projections: Sequence[_Weights]) -> Callable[[Int[Array, ""]], _Weights]:
    """What gives one layer's output projection inside a loop over layers that are alike.

    Factors are stacked, outside of the loop, and the device takes its turn's own. Whole projections
    would take too much memory twice, and are switched between; what nobody reads is not computed.
    """
    if len(projections) == 1:
        return lambda _: projections[0]
    pairs = [own for own in projections if isinstance(own, Projection)]
    if not pairs:
        return _switch(projections)
    whole, factors = _switch([own.w_o for own in pairs]), jnp.stack([own.factor for own in pairs])
    return lambda i: Projection(w_o=whole(i), factor=factors[i])


def _switch(whole: Sequence[Any]) -> Callable[[Int[Array, ""]], Any]:
    branches = [functools.partial(_itself, own) for own in whole]
    return lambda i: jax.lax.switch(i, branches)


def _once(needed: Bool[Array, ""], change: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """`change(tree)` if it is needed, else `tree`.

    It is a conditional in the form of a loop that runs once or not at all: through a conditional
    XLA copies what is passed, through a loop it updates it in place.
    """

    def run(state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        return vary_like(jnp.zeros((), bool), state[0]), change(state[1])

    return bits.while_loop(lambda state: state[0], run, (needed, tree))[1]


def _queries(cache: KVCache) -> list[Array | None]:
    return [stack.queries for stack in cache.stacks]


def _with_queries(cache: KVCache, queries: Sequence[Array | None] | None) -> KVCache:
    own = [None] * len(cache.stacks) if queries is None else queries
    stacks = zip(cache.stacks, own, strict=True)
    return dataclasses.replace(
        cache, stacks=tuple(dataclasses.replace(stack, queries=of) for stack, of in stacks)
    )


def _itself(x: Tree) -> Tree:
    return x
