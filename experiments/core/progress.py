"""Progress on the standard error: a bar on a terminal, one line per finished set elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """Shows how far a run is. A context manager; sets are shown one after the other."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bars: Progress | None = None
        if self._stream.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
        self._task: TaskID | None = None
        self._name, self._total, self._resumed, self._started = "", 0, 0, 0.0

    def __enter__(self) -> RunProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start_set(self, name: str, total: int, done: Sequence[int]) -> None:
        """A set begins.

        Args:
            name: its name.
            total: its rows.
            done: rows that are there from an earlier run, for each cohort of policies that are
                asked together.
        """
        self._name, self._total, self._resumed = name, total, min(done)
        self._started = time.monotonic()
        if self._bars is not None:
            asked = total * len(done)
            self._task = self._bars.add_task(name, total=asked, completed=sum(done))

    def row_done(self) -> None:
        """One more row is stored for a cohort."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)

    def end_set(self) -> None:
        """All rows of the set are stored."""
        if self._bars is None:
            seconds = time.monotonic() - self._started
            resumed = f", {self._resumed} from an earlier run" if self._resumed else ""
            line = f"{self._name}: {self._total} rows in {seconds:.1f} s{resumed}"
            print(line, file=self._stream, flush=True)
