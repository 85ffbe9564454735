"""Budgets of heads and layers found once for a model: which heads a repeated text needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import (
    output_factor,
    per_query_reconstruction,
    window_attention,
)
from restkv_jax.head_budgets import HeadBudgets, Importance, attending_heads
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.protocols import CausalLM, LayerSpec, Projection

# Repeating queries whose weights are alive at once, times the tokens that they see.
BLOCK = 128


def calibrate_head_budgets(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    *,
    budget: int | Sequence[int],
    by: Importance = "attention",
    instruction: Sequence[int] = (),
    sinks: int = 4,
    recent: int = 12,
) -> HeadBudgets:
    """Finds which heads need many entries, by letting the model repeat texts.

    The model reads a text, an instruction and the text again. An entry of a key/value head is as
    important as the repetition finds it at most (KVzip, Kim et al., arXiv 2505.23416): by the
    attention that a repeating query pays to it, or by what that query's output would lose with it
    (Eq. 7 of ReST-KV, in units of the layer's output). One global ranking over layers and heads
    then spends the budget, and how much of it each head gets, averaged over the texts, is what is
    kept: it belongs to the model more than to the texts, of which one or two do, or random tokens.

    Costs a prefill of twice the length for each text; never holds T x T.

    Args:
        model: see `CausalLM`; its loop over layers must be unrolled.
        tokens: texts of one length, without padding, or random token ids. Of a model with sliding
            windows better twice as long as a window: what a window still holds of the text is read
            there, and not in the layers that are measured.
        budget: entries a head on average, for which shares are measured; one or several.
        by: "attention" or "reconstruction".
        instruction: tokens between a text and its repetition.
        sinks: first tokens that every head keeps; they take no part in the ranking.
        recent: last tokens, likewise.

    Raises:
        ValueError: naming the argument.
    """
    budgets = [budget] if isinstance(budget, int) else sorted(set(budget))
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens: expected [B, T], got {tokens.shape}")
    length, forced = tokens.shape[1], sinks + recent
    if min(sinks, recent) < 0 or forced >= length:
        raise ValueError(f"sinks, recent: expected fewer than {length}, got {sinks} and {recent}")
    window = max((spec.window or 0 for spec in model.layer_specs), default=0)
    if length <= window:
        raise ValueError(
            f"tokens: expected more than {window}, the sliding window of other layers, which would "
            f"repeat the text by themselves; got {length}"
        )
    if by not in get_args(Importance):
        raise ValueError(f"by: expected attention or reconstruction, got {by!r}")
    if not budgets or not forced < budgets[0] <= budgets[-1] <= length:
        raise ValueError(f"budget: expected more than {forced} and at most {length}, got {budget}")
    heads = attending_heads(model.layer_specs)
    if not any(heads):
        raise ValueError("model: all layers have a sliding window, so that no budget is spent")
    between = jnp.asarray(instruction, jnp.int32).reshape(1, -1)
    total = {one: np.zeros(sum(heads)) for one in budgets}
    for text in tokens:
        found = repetition_importance(model, text[None], between, by=by)
        free = np.concatenate([np.asarray(x)[0, :, sinks : length - recent] for x in found])
        for one in budgets:
            total[one] += global_counts(free, (one - forced) * len(free))
    shares = {one: tuple((count / count.sum()).tolist()) for one, count in total.items()}
    return HeadBudgets(by=by, heads=heads, forced=forced, length=length, shares=shares)


@functools.partial(jax.jit, static_argnames=("by",))
def repetition_importance(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    instruction: Int[Array, "1 I"],
    *,
    by: Importance = "attention",
) -> tuple[Float[Array, "B K T"], ...]:
    """What a text's entries are to its repetition, for each layer that sees everything.

    The maximum over the queries of the instruction and the repetition, and over the query heads of
    a group.

    Args:
        model: see `CausalLM`.
        tokens: texts, without padding.
        instruction: what comes between a text and its repetition, possibly nothing.
        by: see `calibrate_head_budgets`.

    Raises:
        ValueError: the model scans over its layers.
    """
    batch, length = tokens.shape
    between = jnp.broadcast_to(instruction, (batch, instruction.shape[1]))
    joint = jnp.concatenate([tokens, between, tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(joint.shape[1]), joint.shape)
    specs = model.layer_specs

    def attend(
        layer: int | Array,
        q: Array,
        k: Array,
        v: Array,
        w_o: Array | Projection,
        found: tuple[Array, ...],
    ) -> tuple[Array, tuple[Array, ...]]:
        if not isinstance(layer, int):
            raise ValueError("model: expected an unrolled loop over layers, got a scan")
        out, importance = _layer_importance(q, k, v, w_o, spec=specs[layer], length=length, by=by)
        return out, found if specs[layer].window is not None else (*found, importance)

    start: tuple[Array, ...] = ()
    return model(joint, positions, attend, start)[1]


@functools.partial(jax.jit, static_argnames=("spec", "length", "by"))
def _layer_importance(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    w_o: Float[Array, "N H D"] | Projection,
    *,
    spec: LayerSpec,
    length: int,
    by: Importance,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B K T"]]:
    """One layer's attention over text and repetition, and the importance of the text's entries."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    batch, heads, columns, _ = q.shape
    lengths = jnp.full(batch, columns, jnp.int32)
    out, _ = causal_attention(q, k, v, lengths, spec=spec, rows=0)
    out = jnp.swapaxes(out, 1, 2)
    if spec.window is not None:
        return out, jnp.zeros((batch, spec.num_kv_heads, length))
    factor = w_o.factor if isinstance(w_o, Projection) else output_factor(w_o)
    repeating = columns - length
    blocks = -(-repeating // BLOCK)
    # Whole blocks; the queries behind the end see the same keys and are left out.
    surplus = ((0, 0), (0, 0), (0, blocks * BLOCK - repeating), (0, 0))
    rows = jnp.moveaxis(
        jnp.pad(q[:, :, length:], surplus).reshape(batch, heads, blocks, BLOCK, -1), 2, 0
    )

    def step(most: Array, args: tuple[Array, Array]) -> tuple[Array, None]:
        block, queries = args
        row = block * BLOCK + jnp.arange(BLOCK)
        distance = (length + row)[:, None] - jnp.arange(columns)
        seen = (distance >= 0) & (row < repeating)[:, None]
        weights = window_attention(
            queries, k, seen[None, None], scale=spec.scale, softcap=spec.softcap
        )
        if by == "attention":
            found = jnp.max(weights[..., :length], axis=2)
        else:
            found = per_query_reconstruction(weights, v, factor, None, past=length)
        return jnp.maximum(most, found), None

    start = jnp.zeros((batch, heads, length), jnp.float32)
    most, _ = jax.lax.scan(step, start, (jnp.arange(blocks), rows))
    return out, jnp.max(most.reshape(batch, spec.num_kv_heads, -1, length), axis=2)


def global_counts(importance: np.ndarray, entries: int) -> np.ndarray:
    """How many of the largest entries of all heads each head holds.

    Args:
        importance: [R, P], heads of all layers.
        entries: how many are counted; ties go to the lower head, then to the lower position.
    """
    best = np.argsort(-importance, axis=None, kind="stable")[:entries]
    return np.bincount(best // importance.shape[1], minlength=importance.shape[0])
