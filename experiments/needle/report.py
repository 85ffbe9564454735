"""Scores of a prediction, and the grids that they make."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.core.plots import heat_map
from experiments.core.results import ResultStore
from experiments.core.rouge import rouge_1
from experiments.core.runner import score_run
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, score_table
from experiments.core.tasks import SetSpec, TaskSet
from experiments.core.uncertainty import Average, Scores, summarise
from experiments.longbench.metrics import normalize_answer


def exact_score(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """100 if the first line holds the whole answer, articles, punctuation and case aside."""
    del spec, classes
    said = f" {normalize_answer(first_line(prediction))} "
    return 100.0 * any(f" {normalize_answer(answer)} " in said for answer in answers)


def rouge_score(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """ROUGE-1 F of the first line against the answer, 0 to 100."""
    del spec, classes
    return 100 * max(rouge_1(first_line(prediction), answer) for answer in answers)


def first_line(prediction: str) -> str:
    """The first line that is not empty."""
    return prediction.strip().split("\n")[0]


def write_report(
    store: ResultStore,
    exact: Scores,
    sets: Sequence[TaskSet],
    averages: Sequence[Average],
    *,
    plots: bool,
) -> list[TextTable]:
    """Writes `needle.json` and the heat maps of a finished run.

    Args:
        store: the run's folder.
        exact: the rows' exact scores.
        sets: one for each length.
        averages: of the table.
        plots: whether to write PNG files.

    Returns:
        The table of ROUGE scores.
    """
    rouge = score_run(sets, list(exact), store, rouge_score)
    depths = sorted({_depth(row.others) for task in sets for row in task.rows})
    measures = {"exact": exact, "rouge": rouge}
    grids = {
        name: {policy: grid(scores[policy], sets, depths) for policy in scores}
        for name, scores in measures.items()
    }
    lengths = [task.spec.name for task in sets]
    content = {
        "lengths": lengths,
        "depths": depths,
        **{
            name: {policy: np.round(values, 2).tolist() for policy, values in of.items()}
            for name, of in grids.items()
        },
    }
    write_atomic(store.folder / "needle.json", dump_json(content))
    if plots:
        _plot(store.folder, grids, [f"{depth:g}" for depth in depths], lengths)
    return [score_table("ROUGE-1 F against the answer, 0-100", summarise(rouge, averages))]


def grid(
    scores: Mapping[str, Sequence[float]], sets: Sequence[TaskSet], depths: Sequence[float]
) -> np.ndarray:
    """Mean score of each cell.

    Args:
        scores: set -> score of each row.
        sets: one for each length.
        depths: in percent.

    Returns:
        [D, T], depths by lengths, NaN where a cell has no row.
    """
    values = np.full((len(depths), len(sets)), np.nan)
    for column, task in enumerate(sets):
        for line, depth in enumerate(depths):
            cell = [
                score
                for row, score in zip(task.rows, scores[task.spec.name], strict=True)
                if _depth(row.others) == depth
            ]
            if cell:
                values[line, column] = statistics.fmean(cell)
    return values


def _depth(others: Mapping[str, float] | None) -> float:
    assert others is not None
    return others["depth"]


def _plot(
    folder: Path,
    grids: Mapping[str, Mapping[str, np.ndarray]],
    depths: Sequence[str],
    lengths: Sequence[str],
) -> None:
    labels = {"exact": "exact matches, %", "rouge": "ROUGE-1 F, 0-100"}
    for name, of in grids.items():
        for policy, values in of.items():
            heat_map(
                folder / f"{name}-{policy}.png",
                values,
                title=policy,
                label=labels[name],
                names=("depth of the needle, %", "tokens"),
                ticks=(depths, lengths),
                best=100.0,
            )
