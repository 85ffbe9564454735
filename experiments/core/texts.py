"""Whole texts from files: a file, or a folder of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.files import parse_jsonl, read_bytes

_SUFFIXES = (".txt", ".raw", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Attributes:
        name: name of its file, and its number there if it is one of several.
        text: the text.
    """

    name: str
    text: str


def read_texts(data: str) -> tuple[Text, ...]:
    """Reads texts: one for each `.txt` or `.raw` file, one for each line of a `.jsonl`.

    Lines of a `.jsonl` file hold the text in their field "text". Any file may be gzipped.

    Args:
        data: the `--data` option: a file, or a folder whose files are read in the order of their
            names, others being left alone.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds no text.
    """
    path = Path(data)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _kind(file)]
        if not files:
            raise UserError(f"--data {data}: no text file there ({', '.join(_SUFFIXES)})")
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"--data {data}: no such file or folder")
    return tuple(text for file in files for text in _read(file))


def _read(file: Path) -> list[Text]:
    content = read_bytes(file)
    if _kind(file) == ".jsonl":
        found = parse_jsonl(content, _field, str(file))
        return [Text(f"{file.name}:{number}", text) for number, text in enumerate(found, start=1)]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"{file}: holds no text")
    return [Text(file.name, text)]


def _kind(file: Path) -> str | None:
    name = file.name.removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _field(record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("field 'text' must be a string that is not empty")
    return text
