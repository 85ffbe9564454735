"""A run from its task sets to its tables: opens the folder, evaluates, scores, writes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.progress import RunProgress
from experiments.core.results import Record, ResultStore, prediction_row
from experiments.core.runner import Engine, Prompting, Score, Tokenizer, evaluate, score_run
from experiments.core.storage import write_atomic
from experiments.core.table import (
    TextTable,
    cost_table,
    difference_table,
    markdown,
    score_table,
)
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Average


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
    make_engine: Callable[[], Engine],
    tokenizer: Tokenizer,
    prompting: Prompting,
    score: Score,
    seed: int,
    averages: Sequence[Average] = (),
    record: Record = prediction_row,
    progress: RunProgress | None = None,
) -> list[TextTable]:
    """Runs, or goes on with, one evaluation.

    Args:
        folder: the results folder.
        config: everything that influences a prediction, `describe_sets` included.
        environment: versions, device and commit, for `run_meta.json`.
        title: title of the score table.
        sets: the sets to ask.
        policies: labels of the policies.
        make_engine: builds the engine; called after the folder was accepted, and only if a row
            is left to ask.
        tokenizer: the model's.
        prompting: how rows become prompts.
        score: scores one prediction.
        seed: base of the rows' seeds.
        averages: means over sets that the results hold.
        record: format of the prediction files.
        progress: shows the progress; a default one if None.

    Returns:
        Tables of scores, of differences between policies, and of costs. The folder's `table.md`
        has them too, with the differences of each set where there are averages.

    Raises:
        UserError: if the folder is in use, holds another configuration, or cannot be written.
    """
    with ResultStore.open(folder, config, record) as store:
        before = store.read_meta().get("sessions", [])
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
            store.write_meta({"finished": finished, "seconds": seconds, "sessions": sessions})

        complete = all(
            store.done(policy, task.spec.name, task.rows) == len(task.rows)
            for task in sets
            for policy in policies
        )
        # Nothing is written before the engine stands: it may refuse the model or the budget.
        engine = None if complete else make_engine()
        finished = False
        write_meta(finished)
        try:
            if engine is not None:
                with progress or RunProgress() as shown:
                    evaluate(
                        sets,
                        policies,
                        engine=engine,
                        tokenizer=tokenizer,
                        prompting=prompting,
                        store=store,
                        progress=shown,
                        seed=seed,
                    )
            tables = _report(folder, store, title, sets, policies, score, averages)
            finished = True
        finally:
            # Also after Ctrl-C: the seconds of every session add up.
            write_meta(finished)
        return tables


def _report(
    folder: Path,
    store: ResultStore,
    title: str,
    sets: Sequence[TaskSet],
    policies: Sequence[str],
    score: Score,
    averages: Sequence[Average],
) -> list[TextTable]:
    result = store.write_result(score_run(sets, policies, store, score), averages)
    timings = {
        policy: [row for task in sets for row in store.timings(policy, task.spec.name)]
        for policy in policies
    }
    scores, costs = score_table(title, result), cost_table(timings)
    of_sets = [difference_table(result, "sets")] if len(policies) > 1 else []
    of_averages = [difference_table(result, "averages")] if of_sets and averages else []
    write_atomic(folder / "table.md", markdown([scores, *of_averages, *of_sets, costs]))
    return [scores, *(of_averages or of_sets), costs]
