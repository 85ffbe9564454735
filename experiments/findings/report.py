"""Tables of the samples: means with standard errors, and paired differences."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core.table import TextTable

Cell = tuple[str, str]


def tables(samples: Sequence[Mapping[str, Any]]) -> list[TextTable]:
    """For each mode and length all tasks with an answer together, the continuation, and each task.

    A cell is "accuracy % ± standard error / KL ± standard error", KL alone for the continuation.
    Beside it, but for single tasks, the difference of KL from a reference in the same samples, its
    95 % bootstrap interval, and in how many samples it is lower.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for sample in samples:
        mode, length, task = (sample[key] for key in ("mode", "length", "task"))
        groups[mode, length, task].append(sample)
        if task != "continuation":
            groups[mode, length, ""].append(sample)
    return [
        _table(
            mode, length, rows, plain=task == "continuation", paired=task in ("", "continuation")
        )
        for (mode, length, task), rows in sorted(groups.items())
    ]


def bootstrap(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean, by resampling the samples with a fixed seed."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), (draws, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _table(
    mode: str, length: int, samples: Sequence[Mapping[str, Any]], *, plain: bool, paired: bool
) -> TextTable:
    values: dict[Cell, dict[int, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        for cell in sample["cells"]:
            row = values.setdefault((cell["policy"], cell["allocation"]), {})
            row.setdefault(cell["budget"], []).append(cell)
    budgets = sorted({b for row in values.values() for b in row if b})
    reference = values["restkv_k21" if mode == "inside" else "vnorm", "uniform"]
    rows = []
    for (policy, allocation), row in values.items():
        if any(len(row.get(b, row.get(0, []))) < len(samples) for b in budgets):
            continue  # not in all of the samples
        cells = []
        for budget in budgets:
            found = row.get(budget, row.get(0, []))
            cells.append(_mean(found, plain))
            if paired:
                cells.append(_difference(found, reference[budget]))
        rows.append((f"{policy} / {allocation}", *cells))
    counts = collections.Counter(sample["task"] for sample in samples)
    tasks = ", ".join(f"{task} n={n}" for task, n in counts.items())
    columns = [name for b in budgets for name in (str(b), f"ΔKL@{b}")[: 1 + paired]]
    return TextTable(
        f"{mode}, {length} tokens: {tasks}", ("policy / allocation", *columns), tuple(rows)
    )


def _mean(cells: Sequence[Mapping[str, Any]], plain: bool) -> str:
    kl = [cell["kl"] for cell in cells]
    text = f"{statistics.fmean(kl):.3f} ± {_error(kl):.3f}"
    if plain:
        return text
    right = [100.0 * cell["accuracy"] for cell in cells]
    return f"{statistics.fmean(right):.0f} ± {_error(right):.0f} / {text}"


def _difference(cells: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> str:
    """KL less the reference's."""
    gaps = [a["kl"] - b["kl"] for a, b in zip(cells, reference, strict=True)]
    low, high = bootstrap(gaps)
    lower = sum(gap < 0 for gap in gaps)
    return f"{statistics.fmean(gaps):+.2f} [{low:+.2f}, {high:+.2f}] {lower}/{len(gaps)}"


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
