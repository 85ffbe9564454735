"""InfiniteBench's own rows, from a folder or from the hub."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.files import fetch_hub_file, parse_jsonl, read_bytes
from experiments.core.tasks import Row, TaskSet
from experiments.infinitebench.tasks import TASKS, make_spec

HUB_DATA_SET = "xinrongzhang2022/InfiniteBench"
_LETTERS = "ABCD"


def load_sets(
    names: Sequence[str], data: str, *, limit: int | None, explicit: bool, chat: bool
) -> list[TaskSet]:
    """Loads the files of tasks, `TASK.jsonl`, gzipped or not.

    Args:
        names: tasks, in order.
        data: "hub", or a folder.
        limit: first rows of each set to keep; all are checked nevertheless.
        explicit: True when the user named the tasks: one without a file is then an error, else it
            is left out.
        chat: use the model's chat template.

    Raises:
        UserError: a folder or file that is missing, unreadable or broken.
    """
    folder = Path(data)
    if data != "hub" and not folder.is_dir():
        raise UserError(f"--data {data}: no such folder")
    sets = []
    for name in names:
        path = _find(name, None if data == "hub" else folder)
        if path is None:
            if explicit:
                raise UserError(f"--data {data}: no file {name}.jsonl")
            continue
        rows = parse_jsonl(read_bytes(path), functools.partial(parse_row, name), str(path))
        spec = make_spec(name, name, chat=chat)
        sets.append(TaskSet(spec=spec, rows=rows[:limit], source=path.name))
    if not sets:
        raise UserError(f"--data {data}: no file of a task there (such as passkey.jsonl)")
    return sets


def parse_row(name: str, record: Any) -> Row:
    """Checks a row of a task and puts its question into our words.

    Raises:
        ValueError: naming the field that is missing or of the wrong type.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    context, text = record.get("context"), record.get("input")
    if not isinstance(context, str) or not context.strip():
        raise ValueError("field 'context' must be a string that is not empty")
    if not isinstance(text, str):
        raise ValueError("field 'input' must be a string")
    answers = _answers(record.get("answer"))
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("field 'options' must be a list of strings")
    question = text.strip()
    if TASKS[name].metric in ("letter_choice", "debug_choice"):
        question, answers = _choice(name, question, answers, options)
    elif name == "math_find":
        question = _sought(question)
        float(answers[0])  # else found out at the very end
    elif TASKS[name].metric in ("running_results", "last_integer"):
        _ = [int(answer) for answer in answers]
    row = Row(
        input=question,
        context=context,
        answers=answers,
        length=len(context.split()),
        row_id=str(record.get("id")),
    )
    return dataclasses.replace(row, answer_prefix=TASKS[name].prefix)


def _find(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        instead = "use --data DIR with its files, or --data offline"
        return fetch_hub_file(HUB_DATA_SET, f"{name}.jsonl", instead=instead)
    paths = (folder / f"{name}.jsonl{zipped}" for zipped in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _answers(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(
        isinstance(v, str | int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError("field 'answer' must be a text, a number, or a list of them")
    return tuple(str(v) for v in values)


def _choice(
    name: str, question: str, answers: tuple[str, ...], options: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The question with its options, and what counts as right."""
    if len(options) != len(_LETTERS):
        raise ValueError(f"field 'options' must hold {len(_LETTERS)} texts")
    listed = "\n".join(f"{letter}. {o}" for letter, o in zip(_LETTERS, options, strict=True))
    if answers[0] in options:
        letter = _LETTERS[list(options).index(answers[0])]
    elif answers[-1] in _LETTERS:
        letter = answers[-1]
    else:
        raise ValueError("field 'answer' is none of the options")
    if name == "code_debug":
        ask = "Which function has the error? Answer with a letter."
        return f"{listed}\n\n{ask}", (options[_LETTERS.index(letter)], letter)
    return f"{question}\n{listed}\n\nAnswer with a letter.", (letter,)


def _sought(text: str) -> str:
    found = re.search(r"[Tt]he ([\w ]*?\w+) number", text)
    if found is None:
        raise ValueError(f"field 'input' names no number: {text!r}")
    return f"Which is the {found[1]} number of the list?"
