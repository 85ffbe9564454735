"""New tokens through the model and into its cache: one a step, or several at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantized import QuantArray, quantize
from restkv_jax.arguments import check_tokens
from restkv_jax.attention import slot_attention, slot_weights
from restkv_jax.cache import KVCache
from restkv_jax.eviction import When, evict_full
from restkv_jax.protocols import CausalLM, LayerSpec, Projection
from restkv_jax.slots import LayerSlots, LayerStack

_State = tuple[Int[Array, "B T"], KVCache]


def feed(
    model: CausalLM,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    evict: When = "before",
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs tokens that follow what the cache holds.

    Each layer writes its new keys and values first and attends to the slots afterwards; kernels do
    both in one pass. In this order every read of the cache hangs on the last write, and XLA updates
    a cache that is donated or carried through a loop in place.

    Args:
        model: see `CausalLM`.
        cache: room for the valid tokens of each row, in the layers that are no rings, unless it
            evicts while decoding.
        tokens: T tokens of each row.
        valid: False for columns to skip; their hidden states mean nothing.
        evict: of a cache that evicts while decoding: "before" makes room where these tokens
            would not fit, "after" goes back to the budget as soon as they were seen.

    Returns:
        Hidden states after the final norm, and the cache with the tokens in it.

    Raises:
        ValueError: no tokens, a mask of another shape, or not a row of them for each of the cache.
    """
    check_tokens(tokens, valid)
    given, rows = tokens.shape[0], cache.next_position.shape[0]
    if given != rows:
        raise ValueError(
            f"tokens: expected {rows} row(s), one for each of the cache, got {given}; to go on "
            "from one cache in n ways, join it with itself: `join_rows([cache] * n)`"
        )
    specs = model.layer_specs
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    start = cache.next_position
    if cache.eviction is not None and evict == "before":
        cache = evict_full(model, cache, count, start, evict)
        for stack in cache.stacks:
            # Always True: the new queries wait for the eviction, which reads those they replace.
            # Without an order between them, XLA copies what one reads while the other writes.
            valid &= stack.ring | (stack.used[0][:, None] >= 0)
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    positions = jnp.where(valid, start[:, None] + rank, -1)

    def attend(
        layer: int | Array,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        _: Float[Array, "N H D"] | Projection,
        state: _State,
    ) -> tuple[Float[Array, "B T N H"], _State]:
        positions, cache = state
        spec = specs[layer if isinstance(layer, int) else 0].share(q.shape[2])
        index, row = cache.place(layer)
        stack = cache.stacks[index].remember(row, q, positions)
        # Sets by query head store a copy of the key/value head for each of its query heads.
        copies = stack.heads // spec.num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        if q.shape[1] == 1:
            out, stack = stack.attend(row, q, k, v, positions, spec)
        elif stack.ring:
            out = _attend_to_ring(q, k, v, stack, row, positions, spec)
            stack = stack.append(row, k, v, positions)
        else:
            stack = stack.append(row, k, v, positions)
            out, stack = _attend(q, stack, row, positions, spec)
        return out, (positions, cache.with_stack(index, stack))

    rotary = positions
    if cache.by_slot:  # the slots that the tokens will be written to, which all layers share
        rotary = jnp.where(valid, cache.stacks[0].used[0][:, None] + rank, -1)
    # All that `attend` reads is in its state, which a sharded model splits by rows and heads.
    hidden, (_, cache) = model(tokens, rotary, attend, (positions, cache))
    stacks = tuple(stack.advance(count) for stack in cache.stacks)
    cache = dataclasses.replace(cache, stacks=stacks, next_position=start + count)
    if cache.eviction is not None and evict == "after":
        cache = evict_full(model, cache, count, start + count, evict)
    return hidden, cache


def _attend(
    q: Float[Array, "B T N H"],
    stack: LayerStack,
    row: int | Array,
    positions: Int[Array, "B T"],
    spec: LayerSpec,
) -> tuple[Float[Array, "B T N H"], LayerStack]:
    """Attention of several tokens over a layer's slots; adds up what they receive, if asked to."""
    layer, by_head = stack.layer(row), jnp.swapaxes(q, 1, 2)
    out = slot_attention(by_head, layer, positions, spec=spec, heads=stack.heads)
    if stack.accumulates:
        received = slot_weights(by_head, layer, positions, spec=spec, heads=stack.heads)
        stack = stack.receive(row, received)
    return jnp.swapaxes(out, 1, 2), stack


def _attend_to_ring(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T J H"],
    v: Float[Array, "B T J H"],
    stack: LayerStack,
    row: int | Array,
    positions: Int[Array, "B T"],
    spec: LayerSpec,
) -> Float[Array, "B T N H"]:
    """Attention over a ring and the new tokens, before they write over what some still see."""
    ring = stack.layer(row)

    def joined(old: Array | QuantArray, new: Array) -> Array | QuantArray:
        new = jnp.swapaxes(new, 1, 2)
        if isinstance(old, QuantArray):
            return jax.tree.map(_join, old, quantize(new))
        return _join(old, new.astype(old.dtype))

    marks = jnp.broadcast_to(positions[:, None], (*ring.positions.shape[:2], positions.shape[1]))
    both = LayerSlots(
        k=joined(ring.k, k),
        v=joined(ring.v, v),
        positions=_join(ring.positions, marks),
        owners=None,
        carried=None,
    )
    out = slot_attention(jnp.swapaxes(q, 1, 2), both, positions, spec=spec, heads=stack.heads)
    return jnp.swapaxes(out, 1, 2)


def _join(old: Array, new: Array) -> Array:
    return jnp.concatenate([old, new], axis=2)
