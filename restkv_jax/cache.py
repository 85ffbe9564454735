"""The key/value cache: a pytree of fixed shape whose empty slots are marked by position."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from pallas_kernels.quantized import QuantArray
from restkv_jax.plan import CachePlan, DecodeEviction
from restkv_jax.protocols import LayerSpec
from restkv_jax.slots import LayerStack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """The cache of a whole model.

    Attributes:
        stacks: layers grouped by kind.
        next_position: int32 [B] true position of the next token; it counts the whole prompt,
            whatever was evicted.
        rows: static; for each layer its stack and its row in the stack.
        eviction: static; what happens when the cache is full, None if it must not get full.
        by_slot: static; rotary positions are the numbers of the slots, see `CachePlan.rope`.
    """

    stacks: tuple[LayerStack, ...]
    next_position: Int[Array, " B"]
    rows: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    eviction: DecodeEviction | None = dataclasses.field(default=None, metadata={"static": True})
    by_slot: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values with their scales, empty slots included."""
        return sum(_bytes(leaf) for s in self.stacks for leaf in jax.tree.leaves((s.k, s.v)))

    @property
    def total_bytes(self) -> int:
        """Bytes of everything: keys, values, positions, cursors, remembered queries."""
        return sum(_bytes(leaf) for leaf in jax.tree.leaves(self))

    @property
    def room(self) -> int | None:
        """Most tokens that a row can take at once, static; None if all layers are rings.

        Without eviction it is the room of a cache that is still empty; see `free` for what is left.
        """
        kept = 0 if self.eviction is None else self.eviction.budget
        room = [
            size // stack.heads_per_list - kept
            for stack in self.stacks
            if not stack.ring
            for size in stack.sizes
        ]
        return min(room, default=None)

    @property
    def free(self) -> Int[Array, " B"]:
        """Tokens that each row can still take at once; of those beyond, some layer loses K/V.

        A cache that evicts while decoding makes room first. Without a bound, as in a cache of
        rings alone, it is the largest int32.
        """
        left = jnp.full_like(self.next_position, jnp.iinfo(jnp.int32).max)
        if self.eviction is not None:
            return left if self.room is None else jnp.full_like(left, self.room)
        for stack in self.stacks:
            if not stack.ring:
                slots = jnp.asarray(stack.sizes, jnp.int32)[:, None] - stack.used
                left = jnp.minimum(left, jnp.min(slots, axis=0) // stack.heads_per_list)
        return left

    def place(self, layer: int | Array) -> tuple[int, int | Array]:
        """A layer's stack and its row there. A traced index needs all layers in one stack.

        Raises:
            ValueError: a traced index, but layers of several shapes or kinds.
        """
        if isinstance(layer, int):
            return self.rows[layer]
        if len(self.stacks) > 1:
            raise ValueError(
                "layer: a traced index needs layers of one kind; unroll the loop over layers"
            )
        return 0, layer

    def with_stack(self, index: int, stack: LayerStack) -> KVCache:
        """This cache with one stack exchanged."""
        stacks = (*self.stacks[:index], stack, *self.stacks[index + 1 :])
        return dataclasses.replace(self, stacks=stacks)

    def slots(self, layer: int) -> int:
        """Slots of a layer's head, or of a list if heads share lists."""
        stack, row = self.rows[layer]
        return self.stacks[stack].sizes[row]

    def kept_positions(self, layer: int) -> Int[Array, "B J S"]:
        """Positions held by a layer's heads, or lists, -1 for empty slots."""
        stack, row = self.rows[layer]
        return self.stacks[stack].layer(row).positions

    def owners(self, layer: int) -> Int[Array, "B J S"] | None:
        """The head that each entry of a layer belongs to, None if every head has its own slots."""
        index, row = self.rows[layer]
        stack = self.stacks[index]
        owners = stack.layer(row).owners
        if owners is None:
            return None
        first = jnp.arange(owners.shape[1])[:, None] * stack.heads_per_list
        return jnp.where(owners >= 0, first + owners, -1)


class _Kind(NamedTuple):
    ring: bool
    heads: int
    lists: int | None
    head_dim: int
    num_heads: int


def init_cache(
    specs: tuple[LayerSpec, ...],
    plan: CachePlan,
    *,
    batch: int,
    prompt_columns: int,
    dtype: DTypeLike,
    query_rows: int | None = None,
    accumulates: bool | None = None,
) -> KVCache:
    """An empty cache. Only `full` and ratio budgets make its size depend on the prompt.

    Layers with a sliding window are ring buffers in stacks of their own, see
    `CachePlan.for_layer`.

    Args:
        specs: the model's layers.
        plan: policy, budgets and headroom.
        batch: B.
        prompt_columns: columns that the prompt is padded to.
        dtype: of keys and values.
        query_rows: last queries to remember in layers without a sliding window; by default what
            the plan's eviction while decoding needs.
        accumulates: whether to add up the attention that entries receive; by default likewise.

    Raises:
        ValueError: positions by slot, but layers that cannot count by them, or budgets of another
            model.
    """
    if query_rows is None:
        query_rows = plan.remembered
    if accumulates is None:
        accumulates = plan.eviction is not None and plan.policy.accumulates
    carries = accumulates or (plan.eviction is not None and plan.policy.carries)
    if plan.rope == "slot":
        _check_slots(specs)
    kinds, sizes = [], []
    for layer, spec in enumerate(specs):
        own = plan.for_layer(spec, prompt_columns)
        heads = own.policy.cache_heads(spec.num_heads, spec.num_kv_heads)
        lists = None
        if own.heads is not None:
            own.heads.lists_here(heads // spec.head_shards, spec)
            lists = own.heads.lists
        kinds.append(
            _Kind(
                ring=spec.window is not None,
                heads=heads,
                lists=lists,
                head_dim=spec.head_dim,
                num_heads=spec.num_heads,
            )
        )
        where = (prompt_columns, layer, len(specs))
        sizes.append(own.slots(*where) if lists is None else own.flat_slots(heads // lists, *where))
    distinct = list(dict.fromkeys(kinds))
    rows, seen = [], dict.fromkeys(distinct, 0)
    for kind in kinds:
        rows.append((distinct.index(kind), seen[kind]))
        seen[kind] += 1
    stacks = []
    for kind in distinct:
        own_sizes = tuple(size for size, k in zip(sizes, kinds, strict=True) if k == kind)
        lists, total = kind.lists or kind.heads, sum(own_sizes)
        shape = (batch, lists, total, kind.head_dim)
        remember = query_rows and not kind.ring
        queries = (len(own_sizes), batch, kind.num_heads, query_rows + 1, kind.head_dim)
        stacks.append(
            LayerStack(
                k=_empty(shape, dtype, plan),
                v=_empty(shape, dtype, plan),
                positions=jnp.full((batch, lists, total), -1, jnp.int32),
                used=jnp.zeros((len(own_sizes), batch), jnp.int32),
                sizes=own_sizes,
                heads=kind.heads,
                ring=kind.ring,
                owners=jnp.full((batch, lists, total), -1, jnp.int32) if kind.lists else None,
                queries=jnp.zeros(queries, dtype) if remember else None,
                carried=(
                    jnp.full((batch, kind.num_heads, total), -1.0, jnp.float32)
                    if carries and not kind.ring
                    else None
                ),
                accumulates=accumulates and not kind.ring,
            )
        )
    return KVCache(
        stacks=tuple(stacks),
        next_position=jnp.zeros(batch, jnp.int32),
        rows=tuple(rows),
        eviction=plan.eviction,
        by_slot=plan.rope == "slot",
    )


def _empty(shape: tuple[int, ...], dtype: DTypeLike, plan: CachePlan) -> Array | QuantArray:
    if plan.storage == "int8":
        scale = jnp.zeros(shape[:-1], jnp.float32)
        return QuantArray(values=jnp.zeros(shape, jnp.int8), scale=scale)
    return jnp.zeros(shape, dtype)


def _check_slots(specs: tuple[LayerSpec, ...]) -> None:
    shapes = [(spec.num_heads, spec.num_kv_heads, spec.head_dim) for spec in specs]
    for layer, spec in enumerate(specs):
        if shapes[layer] != shapes[0]:
            raise ValueError(
                "rope: positions by slot need layers of equal numbers and sizes of heads, "
                f"(N, K, H) is {shapes[0]} in layer 0 and {shapes[layer]} in layer {layer}"
            )
        if spec.rotary is None or spec.window is not None:
            raise ValueError(
                "rope: positions by slot need the rotary frequencies of every layer and no "
                f"sliding window, layer {layer} is {spec}"
            )


def _bytes(x: Array) -> int:
    return x.size * x.dtype.itemsize  # of a `ShapeDtypeStruct` too, unlike `nbytes`
