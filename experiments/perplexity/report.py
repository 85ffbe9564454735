"""Perplexities of all tokens, and by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from experiments.core.plots import lines
from experiments.core.results import ResultStore
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, policy_table
from experiments.core.tasks import TaskSet


def write_report(
    store: ResultStore,
    policies: Sequence[str],
    sets: Sequence[TaskSet],
    *,
    length: int,
    bins: int,
    plots: bool,
) -> list[TextTable]:
    """Writes `perplexity.json` and the plots of a finished run.

    Args:
        store: the run's folder.
        policies: labels of the policies.
        sets: one for each mode.
        length: tokens of each document.
        bins: stretches of positions.
        plots: whether to write PNG files.

    Returns:
        Perplexities of all tokens, and of each stretch of positions.
    """
    content, whole, parts = {}, [], []
    for task in sets:
        mode = task.spec.name
        # Every document has the same length, so that all tokens count alike in a mean of means.
        nll = {
            policy: np.mean([row["pred"] for row in store.predictions(policy, mode)], axis=0)
            for policy in policies
        }
        count = task.spec.max_new_tokens
        edges = stretches(count, bins)
        by_position = {
            policy: [float(np.mean(values[a:b])) for a, b in edges]
            for policy, values in nll.items()
        }
        first = length - count
        content[mode] = {
            "tokens": count * len(task.rows),
            "perplexity": {p: round(math.exp(np.mean(values)), 4) for p, values in nll.items()},
            "positions": [[first + a, first + b] for a, b in edges],
            "perplexity_by_position": {
                policy: [round(math.exp(value), 4) for value in values]
                for policy, values in by_position.items()
            },
        }
        cells = (f"{math.exp(np.mean(values)):.3f}" for values in nll.values())
        whole.append((mode, str(count * len(task.rows)), *cells))
        for i, (a, b) in enumerate(edges):
            cells = (f"{math.exp(values[i]):.3f}" for values in by_position.values())
            parts.append((f"{mode} {first + a} to {first + b - 1}", *cells))
        if plots:
            middles = np.asarray([first + (a + b - 1) / 2 for a, b in edges])
            lines(
                store.folder / f"perplexity-{mode}.png",
                {policy: np.exp(values) for policy, values in by_position.items()},
                title=f"{mode}: {len(task.rows)} texts of {length} tokens",
                label="perplexity",
                axis="position of the predicted token",
                at=middles,
            )
    write_atomic(store.folder / "perplexity.json", dump_json(content))
    return [
        policy_table("perplexity of all tokens", ("mode", "tokens"), policies, whole),
        policy_table("perplexity by position", ("positions",), policies, parts),
    ]


def stretches(count: int, bins: int) -> list[tuple[int, int]]:
    """Cuts a range into stretches whose lengths differ by at most one: their begins and ends."""
    bins = min(bins, count)
    return [(i * count // bins, (i + 1) * count // bins) for i in range(bins)]
