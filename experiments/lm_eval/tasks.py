"""The harness's tasks: found, loaded once to see that they can be, and how they sum up."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.uncertainty import Aggregate
from experiments.lm_eval.offline import TASKS, write_tasks
from experiments.lm_eval.report import Metric
from models.sources import cache_folder


def task_folder(args: argparse.Namespace) -> Path | None:
    """The folder that `--data` names, None for the hub; chooses tasks where none are named.

    Raises:
        UserError: no tasks are named, or there is no such folder.
    """
    if args.data == "offline":
        args.tasks = args.tasks or ",".join(TASKS)
        return write_tasks(cache_folder())
    if args.tasks is None:
        raise UserError("--tasks: expected the names of tasks; only --data offline has a default")
    if args.data == "hub":
        return None
    if not Path(args.data).is_dir():
        raise UserError(f"--data {args.data}: no such folder")
    return Path(args.data)


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's task manager, which knows all of the names.

    Args:
        names: of tasks, groups or tags.
        folder: with more task files.

    Raises:
        UserError: the harness is not installed, or a name is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('the harness is not installed: pip install "restkv-jax[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"--tasks: unknown task {name!r}")
    return manager


def load_tasks(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Loads tasks and their data.

    Args:
        manager: see `find_tasks`.
        names: of tasks, groups or tags.

    Returns:
        Task -> the harness's object, of all tasks behind the names.

    Raises:
        UserError: one cannot be loaded.
    """
    try:
        return dict(manager.load(list(names))["tasks"])
    except (OSError, ConnectionError) as error:
        raise UserError(f"--tasks {','.join(names)}: cannot be loaded ({error})") from error


def harness_aggregate(tasks: Mapping[str, Any], metric: Metric) -> Aggregate | None:
    """How the harness makes a metric's figure from its rows.

    Args:
        tasks: see `load_tasks`.
        metric: of one of them.

    Returns:
        One of the functions that the harness knows by a name, or None: a function of a task's own
        may load a model.
    """
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    known = dict(AGGREGATION_REGISTRY.items()).values()
    function = tasks[metric.task].aggregation().get(metric.name)
    return function if function in known else None
