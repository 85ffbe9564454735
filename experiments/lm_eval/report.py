"""The harness's results as scores of rows, with errors and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.core.errors import UserError


def row_scores(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Scores of single rows, of the metrics that are a number between 0 and 1 for each row.

    Args:
        results: what `simple_evaluate` returned, with samples.

    Returns:
        "task metric" -> 0 to 100 for each row, in the order of the rows. A filter's name stands
        behind the metric's if a task has several.
    """
    found = {}
    for task, samples in results["samples"].items():
        filters = {sample["filter"] for sample in samples}
        for name in sorted(filters):
            rows = sorted((s for s in samples if s["filter"] == name), key=lambda s: s["doc_id"])
            for metric in rows[0]["metrics"]:
                values = [row[metric] for row in rows]
                label = f"{task} {metric}" + (f" {name}" if len(filters) > 1 else "")
                if all(isinstance(v, bool | int | float) and 0 <= v <= 1 for v in values):
                    found[label] = [100.0 * float(value) for value in values]
    return found


def plain_results(results: Mapping[str, Any]) -> dict[str, dict[str, float | str]]:
    """The harness's own figures: task -> "metric,filter" -> value."""
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
        for task, metrics in results["results"].items()
    }


def common_scores(
    scores: Mapping[str, Mapping[str, list[float]]],
) -> dict[str, dict[str, list[float]]]:
    """The scores that all policies have.

    Raises:
        UserError: there is none, because no metric is a number for each row.
    """
    first, *others = scores.values()
    names = [name for name in first if all(name in other for other in others)]
    if not names:
        raise UserError("--tasks: no metric is a number for each row; see harness.json")
    return {policy: {name: own[name] for name in names} for policy, own in scores.items()}
