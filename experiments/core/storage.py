"""Files that survive a kill or a full disk: atomic whole files, append-only row files, a lock."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks of this kind, so none is taken.
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file so that readers, and kills, see the old one or the new one.

    Raises:
        UserError: if it cannot be written, for want of space say; the old file is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result is as readable as any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def dump_json(value: Any) -> str:
    """JSON as the result files hold it: indented, keys in the given order, a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class RowFile:
    """An append-only `.jsonl` file whose rows are on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[dict[str, Any]]:
        """Reads the rows, dropping from the file what a kill left of an unfinished last line.

        Raises:
            UserError: if a finished line is not a JSON object.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.path, end)
        rows = []
        for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(
                    f"{self.path}, line {number}: damaged; delete the file to run its rows again"
                )
            rows.append(row)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends one row, and waits until it is on disk.

        Raises:
            UserError: if it cannot be written; the rows before it stay as they were.
        """
        data = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; the rows before are "
                "safe, the same command resumes after them"
            ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one writing process; a kill of any kind releases it.

    A folder in which nothing was written in the meantime is removed again.

    Raises:
        UserError: if another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, after the run
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{folder}: another process is writing there") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
