"""The harness's tasks: found, loaded once to see that they can be, and how they sum up."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.harness import read_task
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
        UserError: the harness is not installed, or a name is unknown; files of the folder that
            cannot be read are named then.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('the harness is not installed: pip install "restkv-jax[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            damaged = "; ".join(_damaged(folder)) if folder is not None else ""
            raise UserError(f"--tasks: unknown task {name!r}" + (damaged and f"; {damaged}"))
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
    # What the data library logs of data that it cannot read, it raises as well.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    return {task: loaded for name in names for task, loaded in _load(manager, name).items()}


def check_rows(
    tasks: Mapping[str, Any], *, limit: int | None, fewshot: int | None, seed: int
) -> None:
    """Makes the prompt and the continuations of every row, as the harness does when a run begins.

    Args:
        tasks: see `load_tasks`.
        limit: how many rows of each task are wanted; None for all.
        fewshot: examples before each of them; None for what the task says.
        seed: that they are drawn by.

    Raises:
        UserError: a row, or an example before it, does not fit its task's templates.
    """
    for name, task in tasks.items():
        own = task.config.num_fewshot
        examples = own if own == 0 or fewshot is None else fewshot
        task.set_fewshot_seed(seed)
        for row, doc in task.doc_iterator(limit=limit):
            try:
                prefix = task.doc_to_prefix(doc)
                prompt = task.fewshot_context(doc, num_fewshot=examples or 0, gen_prefix=prefix)
                task.construct_requests(doc=doc, ctx=prompt, metadata=(name, row, 1))
            # Templates are anyone's, too, and some are Python.
            except Exception as error:
                after = f" after {examples} examples" if examples else ""
                raise UserError(
                    f"--tasks {name}: no prompt can be made of row {row}{after}: {_reason(error)}"
                ) from error


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


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    # Files and data are anyone's: the harness and its data library raise what they come upon.
    except Exception as error:
        entry = manager.task_index[name]
        for member in _members(entry):
            if member in manager.task_index:
                _load(manager, member)  # complains of the one at fault
        config = entry.cfg or {}
        data = (config.get("dataset_kwargs") or {}).get("data_files")
        where = ", ".join(str(one) for one in (entry.yaml_path, data) if one)
        raise UserError(
            f"--tasks {name}: cannot be loaded ({where or 'a tag'}): {_reason(error)}"
        ) from error


def _members(entry: Any) -> list[str]:
    """What a group or a tag, which has no file, consists of; nothing for a task."""
    members = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
    if not isinstance(members, list):
        return []
    return [m if isinstance(m, str) else m.get("task") or m.get("group") for m in members]


def _reason(error: BaseException) -> str:
    """An error and what caused it; the type alone often says more than the message."""
    own = f"{type(error).__name__}: {error}".rstrip(": ")
    return own if error.__cause__ is None else f"{own}: {_reason(error.__cause__)}"


def _damaged(folder: Path) -> list[str]:
    """What is wrong with the task files of a folder, which the harness passes over in silence."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            read_task(path)
        except (OSError, ValueError) as error:
            found.append(f"{path} cannot be read ({error})")
    return found
