"""Task files of the installed `lm_eval` package, which is read but never imported.

The official wordings of the benchmarks are in them, and no copy of those belongs into this project.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from experiments.core.environment import package_version
from experiments.core.errors import UserError


def task_folder(name: str) -> Path:
    """The folder of a benchmark's tasks in the package.

    Raises:
        UserError: the package is missing.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--prompts official reads the wordings from the package lm_eval, which is not "
            'installed: pip install "restkv-jax[eval]" (or use --prompts own)'
        )
    return Path(next(iter(spec.submodule_search_locations))) / "tasks" / name


def read_task(path: Path) -> dict[str, Any]:
    """A task's settings, those of the files that it includes among them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, or holds no settings.
    """
    yaml = importlib.import_module("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """Reads `!function` tags as nothing: only texts and numbers are wanted."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        task = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(task, dict):
        raise ValueError(f"{path.name} holds no settings")
    included = task.get("include") or []
    merged: dict[str, Any] = {}
    for file in [included] if isinstance(included, str) else included:
        merged |= read_task(path.parent / file)
    return merged | task


def unreadable(what: str, error: Exception) -> UserError:
    """The complaint that the package does not hold what was looked for where it was."""
    return UserError(
        f"--prompts official: cannot read {what} from lm_eval {package_version('lm_eval')}: "
        f"{error!r}"
    )
