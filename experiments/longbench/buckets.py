"""LongBench-E's scores by length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.core.results import ResultStore
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, policy_table
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Scores, standard_error

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
        Set and bucket x policy, with standard errors, and the mean of the sets in each bucket.
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
            cells = [split[policy][name][bucket] for policy in split]
            rows.append((f"{name} {bucket}", str(len(cells[0])), *map(_cell, cells)))
        if len(filled) > 1:
            means = (
                statistics.fmean(statistics.fmean(own[name][bucket]) for name in filled)
                for own in split.values()
            )
            rows.append((f"mean of sets {bucket}", "", *(f"{mean:.2f}" for mean in means)))
    return [policy_table("scores by length in words", ("set", "n"), list(split), rows)]


def _cell(values: Sequence[float]) -> str:
    error = standard_error(values)
    mean = f"{statistics.fmean(values):.2f}"
    return mean if error is None else f"{mean} ± {error:.2f}"
