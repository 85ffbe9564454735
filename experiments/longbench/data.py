"""Reads and checks LongBench rows: from a folder or from the hub's data set.

Which file of a folder serves a set, the first that exists: `<set>.jsonl`, `<set>.sample.jsonl`,
`<set>.short.jsonl`, `<set>_e.jsonl` (LongBench-E), each also with `.gz`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.files import fetch_hub_file, parse_jsonl, read_bytes
from experiments.core.tasks import Row, SetSpec, TaskSet

HUB_DATA_SET = "THUDM/LongBench"
HUB_FILE = "data.zip"
_SUFFIXES = (".jsonl", ".sample.jsonl", ".short.jsonl", "_e.jsonl")


def find_file(folder: Path, name: str, *, even: bool = False) -> Path | None:
    """The file that serves a set (see the module's rule), or None; `even` asks for LongBench-E."""
    suffixes = _SUFFIXES[-1:] if even else _SUFFIXES
    candidates = (
        folder / f"{name}{suffix}{zipped}" for suffix in suffixes for zipped in ("", ".gz")
    )
    return next((path for path in candidates if path.is_file()), None)


def parse_row(record: Any) -> Row:
    """Checks one decoded line.

    Raises:
        ValueError: naming the field that is missing or of the wrong type.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    for field in ("input", "context", "answers", "length"):
        if field not in record:
            raise ValueError(f"field '{field}' is missing")
    for field in ("input", "context"):
        if not isinstance(record[field], str):
            raise ValueError(f"field '{field}' must be a string")
    if not record["context"].strip():
        raise ValueError("field 'context' is empty")
    length = record["length"]
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise ValueError("field 'length' must be a whole number")
    classes = record.get("all_classes")
    row_id = record.get("_id")
    if row_id is not None and not isinstance(row_id, str):
        raise ValueError("field '_id' must be a string or null")
    return Row(
        input=record["input"],
        context=record["context"],
        answers=_strings(record["answers"], "answers"),
        length=length,
        all_classes=None if classes is None else _strings(classes, "all_classes"),
        row_id=row_id,
    )


def parse_rows(text: bytes, spec: SetSpec, where: str) -> tuple[Row, ...]:
    """Reads the rows of one set from the bytes of a `.jsonl` file.

    Args:
        text: the decompressed file.
        spec: the set; a classification set needs the classes in each row, a retrieval set a
            paragraph in each answer.
        where: the file's name for messages.

    Raises:
        UserError: at the first broken line, naming file, line and field; or without any row.
    """

    def parse(record: Any) -> Row:
        row = parse_row(record)
        _check_for_metric(row, spec)
        return row

    return parse_jsonl(text, parse, where)


def load_folder(
    folder: Path,
    specs: Sequence[SetSpec],
    *,
    limit: int | None = None,
    explicit: bool = False,
    even: bool = False,
) -> list[TaskSet]:
    """Loads sets from a folder of official files.

    Args:
        folder: the folder.
        specs: the sets wanted, in order.
        limit: first rows of each set to keep; all rows are checked nevertheless.
        explicit: True when the user named the sets: one without a file is then an error, else it
            is left out.
        even: files of LongBench-E only.

    Raises:
        UserError: for a missing folder or file, an unreadable file, a broken line.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    loaded = []
    for spec in specs:
        path = find_file(folder, spec.name, even=even)
        if path is None:
            if explicit:
                file = f"{spec.name}{'_e' if even else ''}.jsonl"
                raise UserError(f"--data {folder}: no file for set {spec.name} ({file})")
            continue
        rows = parse_rows(read_bytes(path), spec, str(path))
        loaded.append(TaskSet(spec=spec, rows=rows[:limit], source=path.name))
    if not loaded:
        raise UserError(f"--data {folder}: no LongBench file there (such as hotpotqa.jsonl)")
    return loaded


def load_hub(
    specs: Sequence[SetSpec],
    *,
    limit: int | None = None,
    explicit: bool = True,
    even: bool = False,
) -> list[TaskSet]:
    """Loads sets from the hub's data set, downloaded once into the hub's own cache.

    Args:
        specs: the sets wanted, in order.
        limit: see `load_folder`.
        explicit: True when the user named the sets. Three sets are not in LongBench-E, and are left
            out unless they are named.
        even: LongBench-E.

    Raises:
        UserError: if it cannot be downloaded, or lacks a set.
    """
    archive_path = fetch_hub_file(
        HUB_DATA_SET,
        HUB_FILE,
        instead="use --data DIR with the official files, or --data offline",
    )
    loaded = []
    try:
        with zipfile.ZipFile(archive_path) as archive:
            names = {Path(name).name: name for name in archive.namelist()}
            for spec in specs:
                file = f"{spec.name}{'_e' if even else ''}.jsonl"
                if file not in names and even and not explicit:
                    continue
                if file not in names:
                    raise UserError(f"--data hub: {HUB_FILE} holds no {file}")
                rows = parse_rows(archive.read(names[file]), spec, f"{HUB_FILE}/{file}")
                source = f"{HUB_DATA_SET}/{file}"
                loaded.append(TaskSet(spec=spec, rows=rows[:limit], source=source))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data hub: {archive_path} is damaged ({error})") from error
    return loaded


def _strings(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"field '{field}' must be a non-empty list of strings")
    return tuple(value)


def _check_for_metric(row: Row, spec: SetSpec) -> None:
    # Found now, these would otherwise end the run at its very last step, the scoring.
    if spec.metric == "classification" and row.all_classes is None:
        raise ValueError("field 'all_classes' must be a non-empty list of strings")
    if spec.metric == "retrieval" and not all("Paragraph " in a for a in row.answers):
        raise ValueError("field 'answers' names no paragraph (such as 'Paragraph 7')")
