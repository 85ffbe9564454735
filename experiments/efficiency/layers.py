"""Scoring, eviction and attention of single layers, apart from everything around them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from experiments.core.measure import loop_seconds
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.masked_eviction import masked_eviction
from restkv_jax.decode import CachePlan, LayerInputs, LayerSpec, compress, score


def choosing_seconds(
    plan: CachePlan,
    specs: tuple[LayerSpec, ...],
    *,
    batch: int,
    length: int,
    width: int,
    dtype: DTypeLike,
    repeats: int,
) -> tuple[float, float]:
    """What a prefill spends on scoring, and on selecting and moving, in all layers together.

    Every kind of layer is timed once, on random keys and values.

    Args:
        plan: policy and budgets.
        specs: of the layers.
        batch: B.
        length: T.
        width: D.
        dtype: of queries, keys and values.
        repeats: loops of each median.
    """
    kinds: collections.Counter[tuple[LayerSpec, CachePlan, int]] = collections.Counter()
    for layer, spec in enumerate(specs):
        own = plan.for_layer(spec, length)
        kinds[spec, own, min(own.prompt_slots(length, layer, len(specs)), length)] += 1
    scoring = moving = 0.0
    for (spec, own, slots), count in kinds.items():
        if own.policy.needs_budget:
            inputs = _random_layer(spec, own, batch, length, width, dtype, len(specs))
            a, b = _layer_seconds(own, inputs, slots, repeats)
            scoring, moving = scoring + count * a, moving + count * b
    return scoring, moving


def _random_layer(
    spec: LayerSpec,
    plan: CachePlan,
    batch: int,
    length: int,
    width: int,
    dtype: DTypeLike,
    num_layers: int,
) -> LayerInputs:
    queries = min(max(1, plan.policy.query_rows), length)
    size, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (
        (batch, heads, queries, size),
        (batch, kv_heads, length, size),
        (batch, kv_heads, length, size),
        (heads, size, width),
    )
    q, k, v, w_o = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False)
    )
    return LayerInputs(
        q=q,
        k=k,
        v=v,
        w_o=w_o,
        factor=jax.random.normal(keys[4], (heads, size, min(size, width))),
        lengths=jnp.full(batch, length, jnp.int32),
        spec=spec,
        num_layers=num_layers,
        # The prompt's attention hands these over. Of logits near N(0, 1) they are about so large.
        log_sums=jnp.full((batch, heads, queries), math.log(length) + 0.5),
    )


def _layer_seconds(
    plan: CachePlan, layer: LayerInputs, slots: int, repeats: int
) -> tuple[float, float]:
    policy = plan.policy

    # What does not depend on the queries would be moved out of the loop that times it.
    def scored(q: Array, layer: LayerInputs) -> Array:
        q, layer = jax.lax.optimization_barrier((q, layer))
        return score(policy, dataclasses.replace(layer, q=q), capacity=slots)

    scoring, importance = loop_seconds(scored, layer.q, layer, repeats=repeats)
    if policy.selects_by_importance and plan.heads is None:
        budget = jnp.full_like(layer.lengths, slots)

        def moved(importance: Array, k: Array, v: Array) -> object:
            places = layer.positions
            return masked_eviction(importance, k, v, places, budget, capacity=slots)

        return scoring, loop_seconds(moved, importance, layer.k, layer.v, repeats=repeats)[0]

    def compressed(q: Array, layer: LayerInputs) -> object:
        q, layer = jax.lax.optimization_barrier((q, layer))
        layer = dataclasses.replace(layer, q=q)
        return compress(policy, layer, capacity=slots, heads=plan.heads)

    both, _ = loop_seconds(compressed, layer.q, layer, repeats=repeats)
    return scoring, max(both - scoring, 0.0)


def attention_seconds(
    spec: LayerSpec, *, batch: int, slots: int, dtype: DTypeLike, repeats: int
) -> tuple[float, float | None]:
    """One token's attention over a full cache of one layer: this library's, and JAX's own.

    JAX's is cuDNN on GPU, and plain XLA elsewhere; its keys and values are laid out as it wants
    them, [B, S, K, H].

    Args:
        spec: of the layer.
        batch: B.
        slots: S.
        dtype: of queries, keys and values.
        repeats: loops of each median.

    Returns:
        Seconds of both, None where JAX's cannot run this.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, spec.num_heads, spec.head_dim), dtype)
    shape = (batch, spec.num_kv_heads, slots, spec.head_dim)
    k, v = (jax.random.normal(key, shape, dtype) for key in keys[1:])
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), k.shape[:3])
    last = jnp.full(batch, slots - 1, jnp.int32)
    ours = functools.partial(decode_attention, scale=spec.scale, softcap=spec.softcap)
    own, _ = loop_seconds(ours, q, k, v, positions, last, repeats=repeats)
    if spec.softcap is not None:
        return own, None
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    lengths = jnp.full(batch, slots, jnp.int32)

    def library(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        return jax.nn.dot_product_attention(
            q[:, None],
            k,
            v,
            scale=spec.scale,
            key_value_seq_lengths=lengths,
            implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
        )

    try:
        return own, loop_seconds(library, q, k, v, lengths, repeats=repeats)[0]
    except NotImplementedError:  # float32, for cuDNN
        return own, None
