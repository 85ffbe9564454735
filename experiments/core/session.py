"""A run from its task sets to its tables: opens the folder, evaluates, scores, writes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.progress import RunProgress
from experiments.core.results import Record, ResultStore, prediction_row
from experiments.core.runner import Ask, Score, evaluate, score_run
from experiments.core.storage import write_atomic
from experiments.core.table import (
    TextTable,
    cost_table,
    difference_table,
    markdown,
    printed_differences,
    score_table,
)
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Average, Scores

# What a benchmark adds to the results of a finished run: files in the folder, further tables.
Finish = Callable[[ResultStore, Scores], Sequence[TextTable]]
# Scores of rows to those of what is independent, where several rows belong together. A set may have
# several: a word stands behind its name.
Regroup = Callable[[Scores], Scores]


def describe_sets(sets: Sequence[TaskSet]) -> dict[str, Any]:
    """What a configuration has to say of its sets: rows, checksums, prompts, metrics."""
    return {
        task.spec.name: {
            "rows": len(task.rows),
            "checksum": task.checksum,
            "prompt": task.spec.prompt,
            "max_new_tokens": task.spec.max_new_tokens,
            "metric": task.spec.metric,
            "chat": task.spec.chat,
            "first_line_only": task.spec.first_line_only,
            "stop_at_newline": task.spec.stop_at_newline,
            "delimiter": task.spec.delimiter,
        }
        for task in sets
    }


def run_session(
    *,
    folder: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    title: str,
    sets: Sequence[TaskSet],
    policies: Sequence[str],
    make_ask: Callable[[], Ask],
    score: Score,
    averages: Sequence[Average] = (),
    digits: int = 2,
    record: Record = prediction_row,
    finish: Finish | None = None,
    regroup: Regroup | None = None,
    most_together: int | None = None,
    progress: RunProgress | None = None,
) -> list[TextTable]:
    """Runs, or goes on with, one evaluation.

    A folder takes further policies: given with those that it holds, they alone are asked.

    Args:
        folder: the results folder.
        config: everything that influences a prediction, `describe_sets` included; what it says of
            each policy stands under "policies".
        environment: versions, device and commit, for `run_meta.json`.
        title: title of the score table.
        sets: the sets to ask.
        policies: labels of the policies.
        make_ask: makes what asks the rows, its engine included; called after the folder was
            accepted, and only if a row is left to ask.
        score: scores one prediction.
        averages: means over sets that the results hold.
        digits: decimals of the scores.
        record: format of the prediction files.
        finish: adds the benchmark's own files and tables at the end.
        regroup: makes what errors, n and differences are of; None takes every row for itself.
        most_together: policies that are asked together, at most; None asks all that a session
            adds. Those that have programs of their own are read back from disk for each row where a
            process cannot hold them all.
        progress: shows the progress; a default one if None.

    Returns:
        Tables of scores, of differences between policies, the benchmark's own, and of costs. The
        folder's `table.md` has them too, with the differences of each set where there are averages,
        and between all policies where here only those to the first one are.

    Raises:
        UserError: if the folder is in use, holds another configuration, or cannot be written.
    """
    with ResultStore.open(folder, config, record, growing="policies") as store:
        meta = store.read_meta()
        before, cohorts = meta.get("sessions", []), _cohorts(meta, policies, most_together)
        started = time.monotonic()
        session: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sources": {task.spec.name: task.source for task in sets},
            "environment": dict(environment),
        }

        def write_meta(finished: bool) -> None:
            session["seconds"] = round(time.monotonic() - started, 3)
            sessions = [*before, session]
            seconds = round(sum(entry.get("seconds", 0.0) for entry in sessions), 3)
            facts = {"finished": finished, "seconds": seconds, "cohorts": cohorts}
            store.write_meta({**facts, "sessions": sessions})

        complete = all(
            store.done(policy, task.spec.name, task.rows) == len(task.rows)
            for task in sets
            for policy in policies
        )
        # Nothing is written before the engine stands: it may refuse the model or the budget.
        ask = None if complete else make_ask()
        finished = False
        write_meta(finished)
        try:
            if ask is not None:
                with progress or RunProgress() as shown:
                    evaluate(sets, cohorts, ask=ask, store=store, progress=shown)
            scores = score_run(sets, policies, store, score)
            own = finish(store, scores) if finish is not None else ()
            units = scores if regroup is None else regroup(scores)
            result = store.write_result(units, averages, digits)
            timings = {
                policy: [row for task in sets for row in store.timings(policy, task.spec.name)]
                for policy in policies
            }
            tables = _write_tables(folder, title, result, timings, digits, own)
            finished = True
        finally:
            # Also after Ctrl-C: the seconds of every session add up.
            write_meta(finished)
        return tables


def _cohorts(meta: Mapping[str, Any], policies: Sequence[str], most: int | None) -> list[list[str]]:
    """Policies by the session that they came with, of a folder's `run_meta.json` and now."""
    known: list[list[str]] = meta.get("cohorts", [])
    added = [policy for policy in policies if not any(policy in cohort for cohort in known)]
    step = most or len(policies)
    return [*known, *(added[i : i + step] for i in range(0, len(added), step))]


def _write_tables(
    folder: Path,
    title: str,
    result: Mapping[str, Any],
    timings: Mapping[str, Sequence[Mapping[str, Any]]],
    digits: int,
    own: Sequence[TextTable],
) -> list[TextTable]:
    scores, costs = score_table(title, result, digits), cost_table(timings)
    of_sets, of_averages = (
        [difference_table(result, of, digits)] if result["paired"] else []
        for of in ("sets", "averages")
    )
    if not result["averages"]:
        of_averages = []
    write_atomic(folder / "table.md", markdown([scores, *own, *of_averages, *of_sets, costs]))
    return [scores, *own, *printed_differences(result, digits), costs]
