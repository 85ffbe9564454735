"""The harness's results: scores of rows, figures of whole sets, errors and paired differences."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.core.table import (
    TextTable,
    difference_table,
    policy_table,
    printed_differences,
    score_table,
)
from experiments.core.uncertainty import Aggregate, summarise

# Decimals of figures of whole sets: some lie between 0 and 1, others have no bound.
_DIGITS = 4


class Metric(NamedTuple):
    """One metric of one task.

    Attributes:
        task: as the harness names it.
        key: the metric and the filter of its answers, as in the harness's results.
        label: "task metric", with the filter behind it where the task has several.
    """

    task: str
    key: str
    label: str

    @property
    def name(self) -> str:
        """The metric without the filter."""
        return self.key.rpartition(",")[0]


@dataclasses.dataclass(frozen=True)
class SortedMetrics:
    """The metrics of a run, by what is known of their rows.

    Attributes:
        scores: policy -> label -> 0 to 100 for each row, where a row is a number from 0 to 1.
        parts: policy -> label -> what each row adds to the figure of its set.
        aggregates: label -> how `parts` become that figure.
        others: of which there is only the harness's own figure.
    """

    scores: dict[str, dict[str, list[float]]]
    parts: dict[str, dict[str, Sequence[Any]]]
    aggregates: dict[str, Aggregate]
    others: list[Metric]


def metric_rows(results: Mapping[str, Any]) -> dict[Metric, list[Any]]:
    """What the rows say of each metric.

    Args:
        results: what `simple_evaluate` returned, with samples.

    Returns:
        Metric -> a value for each row, in the order of the rows; none where rows have no value.
    """
    found = {}
    for task, samples in results["samples"].items():
        filters = sorted({sample["filter"] for sample in samples})
        for name in filters:
            rows = sorted((s for s in samples if s["filter"] == name), key=lambda s: s["doc_id"])
            for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
                label = f"{task} {metric}" + (f" {name}" if len(filters) > 1 else "")
                values = [row[metric] for row in rows if metric in row["metrics"]]
                whole = len(values) == len(rows)
                found[Metric(task, f"{metric},{name}", label)] = values if whole else []
    return found


def sort_metrics(
    rows: Mapping[str, Mapping[Metric, Sequence[Any]]],
    aggregate_of: Callable[[Metric], Aggregate | None],
) -> SortedMetrics:
    """Sorts metrics, each in one way for all policies.

    Args:
        rows: policy -> see `metric_rows`.
        aggregate_of: metric -> how rows become its figure, cheap enough for a bootstrap; or None.
    """
    found = SortedMetrics({p: {} for p in rows}, {p: {} for p in rows}, {}, [])
    for metric in next(iter(rows.values())):
        own = {policy: values.get(metric, ()) for policy, values in rows.items()}
        aggregate = aggregate_of(metric)
        if all(map(_are_shares, own.values())):
            for policy, values in own.items():
                found.scores[policy][metric.label] = [100.0 * float(value) for value in values]
        elif aggregate and all(_has_figure(values, aggregate) for values in own.values()):
            found.aggregates[metric.label] = _or_nan(aggregate)
            for policy, values in own.items():
                found.parts[policy][metric.label] = values
        else:
            found.others.append(metric)
    return found


def plain_results(results: Mapping[str, Any]) -> dict[str, dict[str, float | str]]:
    """The harness's own figures: task -> "metric,filter" -> value."""
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
        for task, metrics in results["results"].items()
    }


def summarise_sets(metrics: SortedMetrics) -> dict[str, Any]:
    """The figures of whole sets, laid out as `uncertainty.summarise` returns them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw of the rows may lack a class, and that is no news
        return summarise(metrics.parts, digits=_DIGITS, aggregates=metrics.aggregates)


def report_tables(
    result: Mapping[str, Any],
    sets: Mapping[str, Any],
    harness: Mapping[str, Mapping[str, Mapping[str, float | str]]],
    others: Sequence[Metric],
) -> tuple[list[TextTable], list[TextTable], list[TextTable]]:
    """The tables of a run; those that would be empty are left out.

    Args:
        result: the content of `result.json`.
        sets: see `summarise_sets`.
        harness: policy -> see `plain_results`.
        others: metrics of which the harness's own figure is shown.

    Returns:
        The figures; the differences for a terminal; all differences.
    """
    figures: list[TextTable] = []
    printed: list[TextTable] = []
    every: list[TextTable] = []
    for what, summary, digits in (
        ("mean of the rows, 0-100", result, 2),
        ("figures of whole sets, in units of their own", sets, _DIGITS),
    ):
        if not any(summary["n"].values()):
            continue
        figures.append(score_table(f"lm-evaluation-harness, {what}", summary, digits))
        printed += _called(what, printed_differences(summary, digits))
        if summary["paired"]:
            every += _called(what, [difference_table(summary, "sets", digits)])
    if others:
        rows = [
            (metric.label, *(_cell(own[metric.task].get(metric.key)) for own in harness.values()))
            for metric in others
        ]
        title = "lm-evaluation-harness, its own figures where errors are unknown"
        figures.append(policy_table(title, ("set",), list(harness), rows))
    return figures, printed, every


def _called(what: str, tables: Sequence[TextTable]) -> list[TextTable]:
    return [dataclasses.replace(table, title=f"{table.title}: {what}") for table in tables]


def _are_shares(values: Sequence[Any]) -> bool:
    shares = (isinstance(value, bool | int | float) and 0 <= value <= 1 for value in values)
    return len(values) > 0 and all(shares)


def _has_figure(values: Sequence[Any], aggregate: Aggregate) -> bool:
    """Whether rows have a finite figure, and hold no texts: those take seconds for each draw."""
    if len(values) == 0 or any(map(_holds_text, values)):
        return False
    figure = aggregate(values)
    return isinstance(figure, numbers.Real) and math.isfinite(figure)


def _or_nan(aggregate: Aggregate) -> Aggregate:
    """The figure, NaN where a draw of the rows has none: it lacks a class, or is too large."""

    def figure(rows: Sequence[Any]) -> float:
        try:
            return aggregate(rows)
        except (ArithmeticError, ValueError):
            return math.nan

    return figure


def _holds_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and any(map(_holds_text, value))
    )


def _cell(figure: float | str | None) -> str:
    if figure is None:
        return "-"
    return figure if isinstance(figure, str) else f"{figure:.{_DIGITS}f}"
