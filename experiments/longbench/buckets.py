"""LongBench-E's scores by length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.core.results import ResultStore
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, policy_table
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Scores, average_error, standard_error

# Name of a bucket -> the first length that is too long for it, in LongBench's words.
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": None}


def bucket_of(length: int) -> str:
    """The bucket of a row that says to be so long."""
    return next(name for name, end in BUCKETS.items() if end is None or length < end)


def write_buckets(store: ResultStore, scores: Scores, sets: Sequence[TaskSet]) -> list[TextTable]:
    """Writes `pred/POLICY/result_e.json`: set -> bucket -> score, null where it has no row.

    Args:
        store: the run's folder.
        scores: of each row.
        sets: the sets.

    Returns:
        Set and bucket x policy, and the mean of the sets in each bucket, with standard errors.
    """
    split = {
        policy: {
            task.spec.name: {
                bucket: [
                    score
                    for row, score in zip(task.rows, own[task.spec.name], strict=True)
                    if bucket_of(row.length) == bucket
                ]
                for bucket in BUCKETS
            }
            for task in sets
        }
        for policy, own in scores.items()
    }
    for policy, own in split.items():
        content = {
            name: {
                bucket: round(statistics.fmean(values), 2) if values else None
                for bucket, values in of.items()
            }
            for name, of in own.items()
        }
        write_atomic(store.folder / "pred" / policy / "result_e.json", dump_json(content))
    rows = []
    for bucket in BUCKETS:
        filled = [
            task.spec.name
            for task in sets
            if any(bucket_of(row.length) == bucket for row in task.rows)
        ]
        for name in filled:
            values = [own[name][bucket] for own in split.values()]
            cells = (_cell(statistics.fmean(one), standard_error(one)) for one in values)
            rows.append((f"{name} {bucket}", str(len(values[0])), *cells))
        if len(filled) > 1:
            of_sets = ([own[name][bucket] for name in filled] for own in split.values())
            cells = (
                _cell(
                    statistics.fmean(map(statistics.fmean, own)),
                    average_error([*map(standard_error, own)]),
                )
                for own in of_sets
            )
            rows.append((f"mean of sets {bucket}", "", *cells))
    return [policy_table("scores by length in words", ("set", "n"), list(split), rows)]


def _cell(mean: float, error: float | None) -> str:
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"
