"""`summary.csv`, as RULER's own scorer writes it, for each policy and length."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from experiments.core.results import ResultStore
from experiments.core.storage import write_atomic
from experiments.core.table import TextTable
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Scores


def write_summaries(store: ResultStore, scores: Scores, sets: Sequence[TaskSet]) -> list[TextTable]:
    """Writes `pred/POLICY/LENGTH/summary.csv`: tasks, their scores, and how many answers are empty.

    Args:
        store: the run's folder.
        scores: of each row.
        sets: called "LENGTH/TASK".

    Returns:
        No table: the scores are printed already.
    """
    by_length: dict[str, list[str]] = {}
    for task in sets:
        length, _, name = task.spec.name.partition("/")
        by_length.setdefault(length, []).append(name)
    for policy, own in scores.items():
        for length, names in by_length.items():
            found, nulls = [], []
            for name in names:
                found.append(round(statistics.fmean(own[f"{length}/{name}"]), 2))
                texts = [row["pred"] for row in store.predictions(policy, f"{length}/{name}")]
                nulls.append(f"{sum(not text.strip() for text in texts)}/{len(texts)}")
            content = io.StringIO()
            lines = csv.writer(content, lineterminator="\n")
            # The first line numbers the columns there.
            lines.writerow(range(len(names) + 1))
            lines.writerows([("Tasks", *names), ("Score", *found), ("Nulls", *nulls)])
            path = store.folder / "pred" / policy / length / "summary.csv"
            write_atomic(path, content.getvalue())
    return []
