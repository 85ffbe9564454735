"""Runs one sample: a full cache, the scores, and the answer from what each cell keeps of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.findings.cells import (
    POLICIES,
    counts,
    importances,
    kept,
    policies_of,
    ranks_of,
)
from experiments.findings.samples import Sample
from restkv_jax.cache import KVCache
from restkv_jax.decode import CachePlan, CausalLM, Full, HeadBudgets, extend, prefill

# Tokens that follow the prefill are padded to a multiple of this, by whether the question is inside
# the prompt: few shapes to compile.
_WIDTHS = {False: 64, True: 32}
# Cells that go through the model at once.
BATCH = 4


def measure(
    model: CausalLM,
    sample: Sample,
    *,
    inside: bool,
    pairs: Sequence[tuple[str, str]],
    budgets: Sequence[int],
    calibrated: Mapping[str, HeadBudgets],
) -> list[dict[str, Any]]:
    """One sample in all cells.

    A cell's cache is the full one with the entries that it drops marked empty, which is what the
    compressed cache computes with, so that all cells share one compiled program.

    Args:
        model: with its output factors.
        sample: what is asked.
        inside: the question is part of the prompt that is scored; else it comes afterwards.
        pairs: (policy, allocation).
        budgets: entries a key/value head on average.
        calibrated: see `cells.counts`.

    Returns:
        One row a cell, the first one for the full cache: accuracy of the counted tokens under
        teacher forcing, KL(full || cell) in nats a token, and entries a head.
    """
    # With the question inside, the prompt's own logits give the answer's first token; no eviction
    # touches them, so it is not counted.
    prompt = sample.context + (sample.question if inside else [])
    after = ([] if inside else sample.question) + sample.answer
    first = len(after) - len(sample.answer)
    own = np.asarray(sample.counted)
    if inside:
        first, own = first + 1, own[1:]
    width = -(-(len(after) - 1) // _WIDTHS[inside]) * _WIDTHS[inside]
    fed = np.zeros((1, width), np.int32)
    fed[0, : len(after) - 1] = after[:-1]
    valid = np.arange(width)[None] < len(after) - 1
    asked = np.zeros(width, bool)
    asked[first - 1 : len(after) - 1] = own
    targets = np.zeros(width, np.int32)
    targets[: len(after) - 1] = after[1:]

    tokens = jnp.asarray([prompt], jnp.int32)
    plan = CachePlan(policy=Full(), headroom=128)
    _, (cache,) = prefill(model, tokens, jnp.ones(tokens.shape, bool), plans=(plan,))
    names = policies_of(pairs)
    scores = importances(model, tokens, policies=tuple(POLICIES[name] for name in names))
    ranks = {name: ranks_of(x) for name, x in zip(names, scores, strict=True)}

    labels = [("full", "uniform", 0)]
    masks: list[np.ndarray] = [np.ones(ranks[names[0]].shape, bool)]
    for name, spread in pairs:
        importance = scores[names.index(name)]
        for budget in budgets:
            share = counts(
                spread,
                importance,
                budget,
                protected=POLICIES[name].protected,
                calibrated=calibrated,
            )
            labels.append((name, spread, budget))
            masks.append(kept(ranks[name], share))
    reference = _full_logits(model, cache, fed, valid)
    rows = []
    for start in range(0, len(masks), BATCH):
        part = masks[start : start + BATCH]
        batch = np.stack([*part, *[part[-1]] * (BATCH - len(part))])
        right, divergence = _answered(model, cache, batch, fed, valid, reference, targets)
        for (name, spread, budget), mask, hit, kl in zip(
            labels[start:], part, np.asarray(right), np.asarray(divergence), strict=False
        ):
            rows.append(
                {
                    "policy": name,
                    "allocation": spread,
                    "budget": budget,
                    "slots": float(mask.sum()) / math.prod(mask.shape[:2]),
                    "accuracy": float(hit[asked].mean()),
                    "kl": float(kl[asked].mean()),
                }
            )
    return rows


def masked(cache: KVCache, keep: Bool[Array, "B L K T"]) -> KVCache:
    """A full cache of one row as B rows, each with only some of its entries.

    Args:
        cache: of a plan that keeps everything.
        keep: True for the entries that stay, of the layers without a sliding window.
    """
    batch, columns = keep.shape[0], keep.shape[-1]

    def rows(x: Array, axis: int) -> Array:
        return jnp.broadcast_to(x, (*x.shape[:axis], batch, *x.shape[axis + 1 :]))

    stacks = []
    for stack in cache.stacks:
        positions = rows(stack.positions, 0)
        if not stack.ring:
            for row in range(len(stack.sizes)):
                here = slice(stack.start(row), stack.start(row) + columns)
                positions = positions.at[:, :, here].set(
                    jnp.where(keep[:, row], positions[:, :, here], -1)
                )
        stacks.append(
            dataclasses.replace(
                stack,
                k=jax.tree.map(lambda x: rows(x, 0), stack.k),
                v=jax.tree.map(lambda x: rows(x, 0), stack.v),
                positions=positions,
                used=rows(stack.used, 1),
            )
        )
    return dataclasses.replace(
        cache, stacks=tuple(stacks), next_position=rows(cache.next_position, 0)
    )


@jax.jit
def _full_logits(
    model: CausalLM, cache: KVCache, fed: Int[Array, "1 Q"], valid: Bool[Array, "1 Q"]
) -> Float[Array, "Q V"]:
    return extend(model, cache, fed, valid)[0][0]


@functools.partial(jax.jit)
def _answered(
    model: CausalLM,
    cache: KVCache,
    keep: Bool[Array, "B L K T"],
    fed: Int[Array, "1 Q"],
    valid: Bool[Array, "1 Q"],
    reference: Float[Array, "Q V"],
    targets: Int[Array, " Q"],
) -> tuple[Bool[Array, "B Q"], Float[Array, "B Q"]]:
    """Whether each token is the most likely one, and the divergence from the full cache."""
    batch = keep.shape[0]
    rows = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in (fed, valid))
    logits, _ = extend(model, masked(cache, keep), *rows)
    full = jax.nn.log_softmax(reference, axis=-1)
    cut = jax.nn.log_softmax(logits, axis=-1)
    divergence = jnp.sum(jnp.exp(full) * (full - cut), axis=-1)
    return jnp.argmax(logits, axis=-1) == targets, divergence
