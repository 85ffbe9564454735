"""Perplexities of all tokens, and by position, and how sure they are."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core.plots import lines
from experiments.core.results import ResultStore
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, policy_table
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Scores, paired_differences, standard_error


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The exponential of a mean over texts.

    Attributes:
        value: of the mean.
        low: of the mean less its standard error; None with a single text.
        high: of the mean and its standard error; None with a single text.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def perplexity_of(nll: Sequence[float]) -> Perplexity:
    """The perplexity of texts of one length, by their mean negative log-likelihoods in nats."""
    mean, error = statistics.fmean(nll), standard_error(nll)
    if error is None:
        return Perplexity(math.exp(mean))
    return Perplexity(math.exp(mean), math.exp(mean - error), math.exp(mean + error))


def write_report(
    store: ResultStore,
    scores: Scores,
    sets: Sequence[TaskSet],
    *,
    length: int,
    bins: int,
    plots: bool,
) -> list[TextTable]:
    """Writes `perplexity.json` and the plots of a finished run.

    Args:
        store: the run's folder.
        scores: mean negative log-likelihood of each text, in nats a token.
        sets: one for each mode.
        length: tokens of each document.
        bins: stretches of positions.
        plots: whether to write PNG files.

    Returns:
        Perplexities of all tokens, of each stretch of positions, and, of several policies, their
        ratios to the first one.
    """
    content: dict[str, Any] = {}
    whole, parts = [], []
    ratios = perplexity_ratios(scores)
    for task in sets:
        mode, texts, count = task.spec.name, len(task.rows), task.spec.max_new_tokens
        first = length - count
        edges = stretches(count, bins)
        # Every document has the same length, so that all tokens count alike in a mean of means.
        overall = {policy: perplexity_of(own[mode]) for policy, own in scores.items()}
        by_position = {
            policy: _by_position([row["pred"] for row in store.predictions(policy, mode)], edges)
            for policy in scores
        }
        content[mode] = {
            "texts": texts,
            "tokens": count * texts,
            "perplexity": {policy: round(one.value, 4) for policy, one in overall.items()},
            "standard_error": {policy: _range(one) for policy, one in overall.items()},
            "positions": [[first + a, first + b] for a, b in edges],
            "perplexity_by_position": {
                policy: [round(one.value, 4) for one in own] for policy, own in by_position.items()
            },
            "standard_error_by_position": {
                policy: [_range(one) for one in own] for policy, own in by_position.items()
            },
            "ratios": ratios[mode],
        }
        whole.append((mode, str(count * texts), *map(str, overall.values())))
        for (a, b), *cells in zip(edges, *by_position.values(), strict=True):
            parts.append((f"{mode} {first + a} to {first + b - 1}", *map(str, cells)))
        if plots:
            lines(
                store.folder / f"perplexity-{mode}.png",
                {
                    policy: np.asarray([one.value for one in own])
                    for policy, own in by_position.items()
                },
                title=f"{mode}: {texts} texts of {length} tokens, ± standard error",
                label="perplexity",
                axis="position of the predicted token",
                at=np.asarray([first + (a + b - 1) / 2 for a, b in edges]),
                errors={policy: _bars(own) for policy, own in by_position.items()},
            )
    write_atomic(store.folder / "perplexity.json", dump_json(content))
    policies = list(scores)
    titles = ("perplexity of all tokens", "perplexity by position")
    tables = [
        policy_table(f"{title} (a standard error down and up)", names, policies, rows)
        for title, names, rows in zip(
            titles, (("mode", "tokens"), ("positions",)), (whole, parts), strict=True
        )
    ]
    return [*tables, _ratio_table(ratios, policies[0])] if len(policies) > 1 else tables


def perplexity_ratios(scores: Scores) -> dict[str, list[dict[str, Any]]]:
    """How many times as perplexed each policy is as each earlier one, on the same texts.

    Args:
        scores: mean negative log-likelihood of each text, in nats a token.

    Returns:
        For each mode, for each two policies: "policy" (the later one), "against", "ratio", and
        "low" and "high" of the 95 % interval, all of them exponentials of what
        `uncertainty.paired_differences` says; "n", the texts.
    """
    pairs = paired_differences(scores, digits=6)
    modes = next(iter(scores.values()))
    return {
        mode: [
            {
                "policy": pair["policy"],
                "against": pair["against"],
                "ratio": _exp(pair["sets"][mode]["difference"]),
                "low": _exp(pair["sets"][mode]["low"]),
                "high": _exp(pair["sets"][mode]["high"]),
                "n": pair["sets"][mode]["n"],
            }
            for pair in pairs
        ]
        for mode in modes
    }


def stretches(count: int, bins: int) -> list[tuple[int, int]]:
    """Cuts a range into stretches whose lengths differ by at most one: their begins and ends."""
    bins = min(bins, count)
    return [(i * count // bins, (i + 1) * count // bins) for i in range(bins)]


def _by_position(
    nll: Sequence[Sequence[float]], edges: Sequence[tuple[int, int]]
) -> list[Perplexity]:
    """The perplexity of each stretch, of texts with a number for each token."""
    return [perplexity_of([statistics.fmean(text[a:b]) for text in nll]) for a, b in edges]


def _range(one: Perplexity) -> list[float] | None:
    if one.low is None or one.high is None:
        return None
    return [round(one.low, 4), round(one.high, 4)]


def _bars(parts: Sequence[Perplexity]) -> np.ndarray:
    """[2, L]: how far error bars go down and up, nowhere with a single text."""
    ends = [(one.low or one.value, one.value, one.high or one.value) for one in parts]
    return np.diff(np.asarray(ends), axis=1).T


def _ratio_table(ratios: Mapping[str, Sequence[Mapping[str, Any]]], against: str) -> TextTable:
    rows = [
        (
            mode,
            f"{entry['policy']} / {against}",
            str(entry["n"]),
            f"{entry['ratio']:.4f}",
            "-" if entry["low"] is None else f"{entry['low']:.4f} to {entry['high']:.4f}",
        )
        for mode, entries in ratios.items()
        for entry in entries
        if entry["against"] == against
    ]
    columns = ("mode", "policies", "n", "ratio", "95 % interval")
    return TextTable("ratios of perplexities on the same texts", columns, tuple(rows))


def _exp(value: float | None) -> float | None:
    return None if value is None else round(math.exp(value), 4)
