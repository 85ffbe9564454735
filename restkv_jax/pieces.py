"""Prompts in pieces: the exact prefill with smaller activations, or one of bounded memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.varying import vary_like
from restkv_jax.cache import KVCache, init_cache
from restkv_jax.compression import compress
from restkv_jax.feed import feed
from restkv_jax.layer_eviction import cache_inputs, in_order
from restkv_jax.plan import CachePlan, check_plans
from restkv_jax.policies import Full
from restkv_jax.policies.base import ALL_QUERIES
from restkv_jax.prefill import align_right, fill_layer, finish
from restkv_jax.protocols import CausalLM, Projection, State

_State = tuple[Int[Array, " B"], KVCache, tuple[KVCache, ...]]


@functools.partial(jax.jit, static_argnames=("plans", "piece"))
def prefill_chunked(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    plans: tuple[CachePlan, ...],
    piece: int,
) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
    """`prefill` with the prompt in pieces; eviction comes at the end and keeps the same sets.

    Only `piece` tokens at a time pass the layers, so activations do not grow with the prompt; the
    full-length K/V of all layers does, until the end.

    Args:
        model: see `CausalLM`.
        tokens: prompts, padded on either side.
        valid: True for tokens, one contiguous run of at least one in each row.
        plans: what to keep, static.
        piece: tokens of a piece, static.

    Returns:
        As `prefill`.

    Raises:
        ValueError: no tokens in a piece, plans that are none, or a policy that needs all queries at
            once.
    """
    check_plans(plans)
    specs = model.layer_specs
    policies = [plan.policy for plan in plans]
    for policy in policies:
        if policy.query_rows == ALL_QUERIES and not policy.accumulates:
            raise ValueError(f"plans: {policy.name!r} as set here needs all queries at once")
    pieces, lengths = _in_pieces(tokens, valid, piece)
    columns = tokens.shape[1]
    rows = [policy.query_rows for policy in policies if policy.query_rows < ALL_QUERIES]
    cache = init_cache(
        specs,
        CachePlan(policy=Full(), headroom=0),
        batch=tokens.shape[0],
        prompt_columns=columns,
        dtype=model.kv_dtype,
        query_rows=min(max(rows, default=0), columns),
        accumulates=any(policy.accumulates for policy in policies),
    )
    hidden, cache = _feed_pieces(model, cache, pieces, evict="before")
    caches = tuple(
        init_cache(specs, plan, batch=tokens.shape[0], prompt_columns=columns, dtype=model.kv_dtype)
        for plan in plans
    )
    caches = vary_like(caches, pieces)

    def keep(
        layer: int | Array, q: Array, w_o: Array | Projection, state: _State
    ) -> tuple[Array, _State]:
        """The end of a layer: what `attend` does in `prefill`, of what the pieces left behind."""
        lengths, cache, caches = state
        static = layer if isinstance(layer, int) else 0
        spec = specs[static].share(q.shape[2])
        index, row = cache.place(layer)
        stack = cache.stacks[index]
        last = stack.last_queries(row, lengths)
        slots, _ = in_order(stack.layer(row))
        inputs = cache_inputs(slots, stack.heads, last, lengths, w_o, spec, layer, len(specs))
        first = dataclasses.replace(inputs, carried=None)
        positions = inputs.query_positions(last.shape[2])
        filled = []
        for plan, into in zip(plans, caches, strict=True):
            own = plan.for_layer(spec, columns)
            where = (columns, static, len(specs))
            kept = compress(
                own.policy,
                inputs if own.policy.accumulates else first,
                capacity=own.prompt_slots(*where),
                budget=own.row_slots(lengths, *where),
                heads=own.heads,
                budgets_of=static,
            )
            filled.append(fill_layer(into, layer, kept, last, positions, spec))
        return q, (lengths, cache, tuple(filled))

    *_, caches = _end_of_layers(model, keep, (lengths, cache, caches), batch=tokens.shape[0])
    return model.unembed(hidden).astype(jnp.float32), tuple(
        finish(cache, lengths) for cache in caches
    )


@functools.partial(jax.jit, static_argnames=("plan", "piece"))
def prefill_bounded(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    plan: CachePlan,
    piece: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """A prefill whose memory does not grow with the prompt: eviction after every piece.

    Later pieces see what was kept of the earlier ones, so that the result is not that of the
    exact prefill, and each plan needs a pass of its own. The longer a piece, the smaller the
    difference.

    Args:
        model: see `CausalLM`.
        tokens: prompts, padded on either side.
        valid: True for tokens, one contiguous run of at least one in each row.
        plan: what to keep, static; a budget in slots, the same for all layers and heads. The slots
            of a piece stay as room behind it where the plan has fewer.
        piece: tokens of a piece, static.

    Returns:
        Logits of each row's last token in float32, and the cache.

    Raises:
        ValueError: a plan that cannot be followed before the prompt's end.
    """
    if not isinstance(plan.budget, int) or plan.heads is not None or plan.layers != "uniform":
        raise ValueError(
            "plan: a bounded prefill expects a budget in slots, equal for all layers and heads; "
            f"got budget={plan.budget}, layers={plan.layers!r}, heads={plan.heads}"
        )
    pieces, _ = _in_pieces(tokens, valid, piece)
    columns = tokens.shape[1]
    # Behind the budget a piece fits while the prompt lasts, and then all that the plan has.
    room = max(piece, plan.slots(columns) - plan.budget)
    working = dataclasses.replace(plan, decode_budget=plan.budget, evict_every=room, headroom=0)
    cache = init_cache(
        model.layer_specs,
        working,
        batch=tokens.shape[0],
        prompt_columns=columns + plan.headroom,
        dtype=model.kv_dtype,
    )
    hidden, cache = _feed_pieces(model, cache, pieces, evict="after")
    cache = dataclasses.replace(cache, eviction=plan.eviction)
    if plan.eviction is None:
        stacks = (
            dataclasses.replace(stack, queries=None, carried=None, accumulates=False)
            for stack in cache.stacks
        )
        cache = dataclasses.replace(cache, stacks=tuple(stacks))
    return model.unembed(hidden).astype(jnp.float32), cache


def _in_pieces(
    tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], piece: int
) -> tuple[tuple[Int[Array, "P B C"], Bool[Array, "P B C"]], Int[Array, " B"]]:
    """Rows aligned to the right and cut, and the number of tokens in each row."""
    if piece < 1:
        raise ValueError(f"piece: expected at least 1 token, got {piece}")
    tokens, lengths = align_right(tokens, valid)
    tokens = jnp.pad(tokens, ((0, 0), (-tokens.shape[1] % piece, 0)))
    valid = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    cut = (jnp.moveaxis(x.reshape(x.shape[0], -1, piece), 1, 0) for x in (tokens, valid))
    first, second = cut
    return (first, second), lengths


def _feed_pieces(
    model: CausalLM,
    cache: KVCache,
    pieces: tuple[Int[Array, "P B C"], Bool[Array, "P B C"]],
    *,
    evict: Literal["before", "after"],
) -> tuple[Float[Array, "B D"], KVCache]:
    """The hidden state of each row's last token, and the cache with all pieces in it."""

    def step(cache: KVCache, piece: tuple[Array, Array]) -> tuple[KVCache, Array]:
        hidden, cache = feed(model, cache, *piece, evict=evict)
        return cache, hidden[:, -1]

    cache, hidden = jax.lax.scan(step, vary_like(cache, pieces), pieces)
    return hidden[-1], cache


def _end_of_layers(
    model: CausalLM,
    keep: Callable[[int | Array, Array, Array | Projection, State], tuple[Array, State]],
    state: State,
    *,
    batch: int,
) -> State:
    """Runs `keep` once a layer with its output projection, which only the model's calls show.

    The tokens that the model is called with are of no account: nothing uses what it computes, and
    XLA leaves it out.
    """

    def attend(
        layer: int | Array, q: Array, k: Array, v: Array, w_o: Array | Projection, state: State
    ) -> tuple[Array, State]:
        del k, v
        return keep(layer, q, w_o, state)

    token = jnp.zeros((batch, 1), jnp.int32)
    return model(token, token, attend, state)[1]
