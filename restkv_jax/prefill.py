"""Prefill: the prompt's forward pass, each layer's K/V evicted as soon as it was used."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.varying import vary_like
from pallas_kernels.window_scores import output_factor
from restkv_jax.arguments import check_tokens
from restkv_jax.cache import KVCache, init_cache
from restkv_jax.compression import CompressedLayer, compress
from restkv_jax.layer import LayerInputs, Probe
from restkv_jax.plan import CachePlan, check_plans
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.protocols import CausalLM, LayerSpec, Projection
from restkv_jax.received_attention import attention_and_received
from restkv_jax.rerotation import rerotate

_State = tuple[Int[Array, " B"], Int[Array, "B T"], tuple[KVCache, ...]]


def align_right(
    tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Moves each row's tokens to the right end.

    Args:
        tokens: padded on the left, on the right, or on both sides.
        valid: True for tokens; one contiguous run in each row.

    Returns:
        The moved tokens, and the number of tokens in each row.

    Raises:
        ValueError: no integers [B, T] with a mask for each of them.
    """
    check_tokens(tokens, valid)
    columns = tokens.shape[1]
    trailing = jnp.argmax(valid[:, ::-1], axis=1)[:, None]
    source = (jnp.arange(columns) - trailing) % columns
    return jnp.take_along_axis(tokens, source, axis=1), jnp.sum(valid, axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("plans", "probe"))
def prefill(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    plans: tuple[CachePlan, ...],
    probe: int = 0,
) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
    """Runs the prompt once and fills one compressed cache for each plan.

    Attention is exact, over the whole prompt. Eviction happens inside the loop over layers, so
    the full-length K/V of one layer at a time is alive; and since no layer's input depends on
    what another one evicted, one pass serves any number of plans.

    Args:
        model: see `CausalLM`.
        tokens: prompts, padded on either side to a common length (pad to a few lengths only,
            see `bucket_length`: each new one compiles).
        valid: True for tokens, one contiguous run of at least one in each row.
        plans: what to keep, static.
        probe: static; the last tokens of each row, as many, only look at what comes before them,
            such as a prompt to repeat it: policies with a window score by their queries, and the
            logits and caches are those before them. 0 scores by the prompt's own last queries.

    Returns:
        Logits of each row's last token in float32, and a cache for each plan.

    Raises:
        ValueError: tokens and a mask that do not fit together, plans that are none, or a probe that
            leaves no column of the prompt.
    """
    check_plans(plans)
    tokens, lengths = align_right(tokens, valid)
    batch, columns = tokens.shape
    if not 0 <= probe < columns:
        raise ValueError(f"probe: expected less than {columns} columns, got {probe}")
    positions = jnp.maximum(jnp.arange(columns, dtype=jnp.int32) - (columns - lengths[:, None]), -1)
    specs, kept_columns = model.layer_specs, columns - probe
    caches = tuple(
        init_cache(specs, plan, batch=batch, prompt_columns=kept_columns, dtype=model.kv_dtype)
        for plan in plans
    )
    caches = vary_like(caches, tokens, lengths)
    alike = list(zip(*(plan.alike(kept_columns, len(specs)) for plan in plans), strict=True))
    # Layers whose budgets agree in all plans share one compiled unit of work.
    twins = [alike.index(key) for key in alike] if plans else [0] * len(specs)

    def attend(
        layer: int | Array,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        w_o: Float[Array, "N H D"] | Projection,
        state: _State,
    ) -> tuple[Float[Array, "B T N H"], _State]:
        lengths, positions, caches = state
        static = layer if isinstance(layer, int) else 0
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out, kept = _attend_and_evict(
            q,
            k,
            v,
            w_o,
            lengths,
            jnp.asarray(layer, jnp.int32),
            spec=specs[static].share(q.shape[1]),
            plans=plans,
            budgets_of=twins[static],
            num_layers=len(specs),
            probe=probe,
        )
        q, positions_kept = q[:, :, :kept_columns], positions[:, :kept_columns]
        caches = tuple(
            fill_layer(cache, layer, entry, q, positions_kept, specs[static])
            for cache, entry in zip(caches, kept, strict=True)
        )
        return jnp.swapaxes(out, 1, 2), (lengths, positions, caches)

    # All that `attend` reads is in its state, which a sharded model splits by rows and heads.
    hidden, (_, _, caches) = model(tokens, positions, attend, (lengths, positions, caches))
    logits = model.unembed(hidden[:, kept_columns - 1]).astype(jnp.float32)
    return logits, tuple(finish(cache, lengths - probe) for cache in caches)


def finish(cache: KVCache, lengths: Int[Array, " B"]) -> KVCache:
    """The cache of a prompt that all layers have filled."""
    cache = dataclasses.replace(cache, next_position=lengths)
    if not cache.by_slot:
        return cache
    # A new token has one rotary position in all layers: they go on at the same slot.
    (stack,) = cache.stacks
    used = jnp.broadcast_to(jnp.max(stack.used, axis=0), stack.used.shape)
    return cache.with_stack(0, dataclasses.replace(stack, used=used))


@functools.partial(jax.jit, static_argnames=("spec", "plans", "budgets_of", "num_layers", "probe"))
def _attend_and_evict(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    w_o: Float[Array, "N H D"] | Projection,
    lengths: Int[Array, " B"],
    index: Int[Array, ""],
    *,
    spec: LayerSpec,
    plans: tuple[CachePlan, ...],
    budgets_of: int,
    num_layers: int,
    probe: int,
) -> tuple[Float[Array, "B N T H"], tuple[CompressedLayer, ...]]:
    """One layer's attention, and what each plan keeps of its K/V, as one unit of work.

    Nothing that comes later needs what is kept before the end of the prefill, so a scheduler may
    put the evictions of all layers last and hold all full-length K/V until then. A barrier ties
    them to the attention's output. XLA drops barriers on CPU before it schedules; there a
    conditional, whose results come together, does the same.

    `budgets_of` is the layer whose budgets hold and static, `index` the layer itself and not: so
    layers that are alike are traced once.
    """
    columns = k.shape[2] - probe
    plans = tuple(plan.for_layer(spec, columns) for plan in plans)
    queries = min(max([1, *(plan.policy.query_rows for plan in plans)]), columns)
    # A probe's queries attend, too, but nothing is counted of them.
    receives = not probe and any(plan.policy.accumulates for plan in plans)

    if not isinstance(w_o, Projection):
        w_o = Projection(w_o=w_o, factor=output_factor(w_o))

    parts = slice(columns), slice(columns, None)

    def compute(
        q: Array, k: Array, v: Array, w_o: Projection, lengths: Array, index: Array
    ) -> tuple[Array, tuple[CompressedLayer, ...]]:
        received = None
        if receives:
            out, log_sums, received = attention_and_received(q, k, v, lengths, spec=spec)
        else:
            out, log_sums = causal_attention(q, k, v, lengths, spec=spec, rows=queries + probe)
        before, behind = ([x[:, :, part] for x in (q, k, v)] for part in parts)
        inputs = LayerInputs(
            q=before[0][:, :, -queries:],
            k=before[1],
            v=before[2],
            factor=w_o.factor,
            lengths=lengths - probe,
            spec=spec,
            w_o=w_o.w_o,
            index=index,
            num_layers=num_layers,
            log_sums=log_sums[:, :, :queries],
            received=received,
            probe=Probe(q=behind[0], k=behind[1], v=behind[2]) if probe else None,
        )
        kept = tuple(
            compress(
                plan.policy,
                inputs,
                capacity=plan.prompt_slots(inputs.columns, budgets_of, num_layers),
                budget=plan.row_slots(inputs.lengths, inputs.columns, budgets_of, num_layers),
                heads=plan.heads,
                budgets_of=budgets_of,
            )
            for plan in plans
        )
        return out, kept

    compute = jax.jit(compute)  # traced once for both branches
    arrays = (q, k, v, w_o, lengths, index)
    shapes = jax.eval_shape(compute, *arrays)

    def nothing(*_: object) -> tuple[Array, tuple[CompressedLayer, ...]]:
        return jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, x.dtype), x), shapes)

    def on_cpu(*arrays: Any) -> tuple[Array, tuple[CompressedLayer, ...]]:
        return jax.lax.cond(jnp.all(lengths >= 0), compute, nothing, *arrays)

    def elsewhere(*arrays: Any) -> tuple[Array, tuple[CompressedLayer, ...]]:
        return jax.lax.optimization_barrier(compute(*arrays))

    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def fill_layer(
    cache: KVCache,
    layer: int | Array,
    kept: CompressedLayer,
    q: Float[Array, "B N T H"],
    positions: Int[Array, "B T"],
    spec: LayerSpec,
) -> KVCache:
    """Puts what one layer keeps into a cache, and its last queries if the cache remembers any."""
    index, row = cache.place(layer)
    if cache.by_slot:
        assert spec.rotary is not None
        shift = jnp.arange(kept.positions.shape[-1]) - jnp.maximum(kept.positions, 0)
        kept = dataclasses.replace(kept, k=rerotate(kept.k, shift, spec.rotary))
    stack = cache.stacks[index].fill(row, kept)
    if stack.queries is not None:
        last = min(stack.queries.shape[3], q.shape[2])
        stack = stack.remember(row, jnp.swapaxes(q[:, :, -last:], 1, 2), positions[:, -last:])
    return cache.with_stack(index, stack)
