"""Whole texts, under eviction while they go on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.core.engine import kept_slots
from experiments.core.likelihood import follow
from experiments.core.options import Budget, PolicyText
from experiments.lm_eval.model import RollingScore, Window
from experiments.perplexity.measure import make_plans
from restkv_jax.decode import CausalLM, pad_prompts, prefill


def rolling_score(
    model: CausalLM,
    policy: PolicyText,
    budget: Budget,
    *,
    evict_every: int,
    max_length: int,
) -> RollingScore:
    """Scores windows of texts as mode "decode" of `experiments.perplexity` does.

    Args:
        model: with its output factors.
        policy: as the user wrote it.
        budget: of the run; must be whole slots when a window is scored.
        evict_every: tokens between two evictions.
        max_length: tokens of the longest window.
    """

    def score(window: Sequence[int], count: int) -> Window:
        # Made here, so that tasks without whole texts take any budget.
        (plan,) = make_plans(
            [policy], budget, mode="decode", follow=max_length, evict_every=evict_every
        ).values()
        logits, (cache,) = prefill(model, *pad_prompts([window[:1]], columns=1), plans=(plan,))
        followed = follow(model, logits, cache, window[1:])
        return Window(
            logprob=float(np.sum(followed.logprobs[-count:], dtype=np.float64)),
            kept=kept_slots(followed.cache),
            cache_bytes=followed.cache.total_bytes,
        )

    return score
