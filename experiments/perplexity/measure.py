"""Negative log-likelihoods of a document's tokens under each policy's cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.core.engine import check_fit, kept_slots
from experiments.core.errors import UserError
from experiments.core.likelihood import follow
from experiments.core.options import Budget, PolicyText, Ratio, parse_budget
from experiments.core.plans import make_plan
from experiments.core.runner import Cost, Outcome
from experiments.core.tasks import Row, SetSpec
from models import LanguageModel
from restkv_jax.decode import (
    CachePlan,
    bucket_length,
    pad_prompts,
    prefill,
    with_output_factors,
)


def make_plans(
    policies: Sequence[PolicyText], budget: Budget, *, mode: str, follow: int, evict_every: int
) -> dict[str, CachePlan]:
    """The plans of one mode.

    Args:
        policies: as the user wrote them; `decode_budget` and `evict_every` among their options
            go before what follows from the run's.
        budget: of the run.
        mode: "prefill" evicts from the prompt only, "decode" whenever `evict_every` tokens have
            filled the slots behind the budget.
        follow: tokens that follow the prompt.
        evict_every: see `mode`.

    Raises:
        UserError: a policy that cannot evict while decoding, or a budget that is a ratio there.
    """
    plans = {}
    for policy in policies:
        plan = make_plan(policy, budget, headroom=follow)
        if mode == "decode" and plan.policy.needs_budget:
            own = dict(policy.options)
            slots = parse_budget(own["budget"]) if "budget" in own else budget
            if isinstance(slots, Ratio) and "decode_budget" not in own:
                raise UserError(
                    f"--budget {slots} for --policy {policy.label}: eviction while decoding needs "
                    "whole slots; give them, or --modes prefill"
                )
            own = {"decode_budget": str(slots), "evict_every": str(evict_every), **own}
            with_eviction = PolicyText(policy.name, tuple(sorted(own.items())))
            plan = make_plan(with_eviction, budget, headroom=follow)
        plans[policy.label] = plan
    return plans


class Likelihoods:
    """Asks documents for the negative log-likelihoods of their tokens, in nats.

    In mode "prefill" the first `prompt` tokens are prefilled once for all policies and evicted, and
    the others follow. In mode "decode" every token follows the first one.

    Args:
        language_model: the model.
        plans: mode -> policy -> plan.
        prompt: tokens that mode "prefill" evicts from.

    Raises:
        UserError: a plan does not suit the model, or the caches do not fit into memory.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        plans: Mapping[str, Mapping[str, CachePlan]],
        *,
        prompt: int,
    ) -> None:
        self._plans = plans
        self._prompts = {"decode": 1, "prefill": prompt}
        for mode, own in plans.items():
            columns = self._columns(mode)
            check_fit(language_model.model, own, columns, language_model.weights_bytes)
        self._model = with_output_factors(language_model.model)

    def __call__(
        self, spec: SetSpec, row: Row, index: int, policies: Sequence[str]
    ) -> dict[str, Outcome]:
        """See `experiments.core.runner.Ask`; a prediction is a list with one number a token."""
        del index
        assert row.others is not None
        mode, tokens = spec.name, row.others["tokens"]
        prompt, rest = tokens[: self._prompts[mode]], tokens[self._prompts[mode] :]
        plans = tuple(self._plans[mode][label] for label in policies)
        padded = pad_prompts([prompt], columns=self._columns(mode))
        start = time.perf_counter()
        logits, caches = jax.block_until_ready(prefill(self._model, *padded, plans=plans))
        prefill_s = time.perf_counter() - start
        found = {}
        for label, cache in zip(policies, caches, strict=True):
            kept, size = kept_slots(cache), cache.total_bytes
            start = time.perf_counter()
            followed = follow(self._model, logits, cache, rest)
            seconds = time.perf_counter() - start
            if cache.eviction is not None:
                kept = kept_slots(followed.cache)
            values = [round(-float(x), 6) + 0.0 for x in followed.logprobs]
            cost = Cost(
                prompt_tokens=len(prompt),
                context_tokens=len(prompt),
                new_tokens=len(rest),
                prefill_s=prefill_s,
                decode_s=seconds,
                kept_slots=kept,
                cache_bytes=size,
            )
            found[label] = Outcome(values, cost)
        return found

    def _columns(self, mode: str) -> int:
        # Not padded: slots beyond the budget would put evictions off.
        prompt = self._prompts[mode]
        return prompt if mode == "decode" else bucket_length(prompt)


def mean_nll(
    spec: SetSpec, prediction: Any, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """Mean negative log-likelihood of a document's tokens, in nats."""
    del spec, answers, classes
    return sum(prediction) / len(prediction)
