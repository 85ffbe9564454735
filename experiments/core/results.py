"""The results folder of a run: rows, scores and what they were made with.

    <out>/pred/<policy>/<set>.jsonl     a line for each row, in the benchmark's own format
    <out>/pred/<policy>/result.json     {set: score}, as the official scorer writes it
    <out>/timing/<policy>/<set>.jsonl   per row: seconds, cache bytes, kept slots, tokens
    <out>/result.json                   scores of all policies, errors, n, paired differences
    <out>/run_meta.json                 settings, versions, device, commit, seconds
    <out>/table.md                      the tables that were printed

`pred/` is laid out as the official scorer reads it, with the policy in the place of the model.
Everything under `pred/` and `result.json` depends on the configuration alone: a run that was
interrupted and resumed leaves the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.storage import RowFile, dump_json, locked, write_atomic
from experiments.core.tasks import Row
from experiments.core.uncertainty import Average, Scores, summarise

# (row, its number, prediction) -> a line of a prediction file; "pred" must be the prediction.
Record = Callable[[Row, int, Any], dict[str, Any]]


def fingerprint(config: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the configuration's SHA-256, key order aside."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def folder_name(readable: str, config: Mapping[str, Any]) -> str:
    """A readable name and the configuration's fingerprint, fit for any file system."""
    return f"{re.sub(r'[^A-Za-z0-9._=+-]+', '-', readable).strip('-.')}-{fingerprint(config)}"


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the entries in which two nested configurations differ."""
    missing = object()
    names = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, missing), new.get(key, missing)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += [f"{key}.{inner}" for inner in differing_keys(a, b)]
        elif a != b:
            names.append(key)
    return names


def prediction_row(row: Row, index: int, prediction: str) -> dict[str, Any]:
    """A line in LongBench's format: the official fields, then what else is known of the row."""
    return {
        "pred": prediction,
        "answers": list(row.answers),
        "all_classes": None if row.all_classes is None else list(row.all_classes),
        "length": row.length,
        "_id": row.row_id,
        "index": index,
        **asked(row),
    }


def asked(row: Row) -> dict[str, Any]:
    """What a line says of the question; the context can be made again."""
    return {"input": row.input, "answer_prefix": row.answer_prefix}


def _agrees(stored: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether a stored line is this one; lines of earlier versions have fewer fields."""
    missing = object()
    return "pred" in stored and all(line.get(key, missing) == stored[key] for key in stored)


class ResultStore:
    """The folder of one run, written by one process at a time.

    Use `ResultStore.open`, which takes the lock and refuses another configuration's folder.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        record: Record = prediction_row,
        growing: str | None = None,
    ) -> None:
        self.folder = folder
        self._record = record
        self._growing = growing
        # As JSON gives it back, so that tuples and lists compare equal on the next run.
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self._counts: dict[tuple[str, str], int] = {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        record: Record = prediction_row,
        *,
        growing: str | None = None,
    ) -> Iterator[ResultStore]:
        """Opens a run's folder, new or to be resumed.

        Args:
            folder: the output folder.
            config: everything that influences a prediction, as plain JSON values.
            record: the format of the prediction files.
            growing: an entry of the configuration that may have more keys than the folder's; what
                other entries say of those keys is new as well.

        Raises:
            UserError: if the folder is in use, or holds another configuration or other files.
        """
        with locked(folder):
            store = cls(folder, config, record, growing)
            store._check_config()
            yield store

    def done(self, policy: str, set_name: str, rows: Sequence[Row]) -> int:
        """How many first rows of a set a policy has answered already.

        Raises:
            UserError: if the stored rows are not the first rows of the set.
        """
        key = (policy, set_name)
        if key not in self._counts:
            stored = self._predictions(policy, set_name).load()
            for index, record in enumerate(stored):
                if index >= len(rows) or not _agrees(
                    record, self._record(rows[index], index, record.get("pred"))
                ):
                    raise UserError(
                        f"{self._predictions(policy, set_name).path}, line {index + 1}: is not "
                        "this run's row; delete the file to run its rows again"
                    )
            self._counts[key] = len(stored)
        return self._counts[key]

    def append(
        self, policy: str, set_name: str, row: Row, prediction: Any, timing: Mapping[str, Any]
    ) -> None:
        """Stores the next answer of a policy; both lines are on disk when this returns.

        `done` must have counted the rows that are there, and `write_meta` must have said whose
        rows they are: without it the folder is not accepted again.
        """
        index = self._counts[policy, set_name]
        self._timings(policy, set_name).append({"index": index, **timing})
        self._predictions(policy, set_name).append(self._record(row, index, prediction))
        self._counts[policy, set_name] = index + 1

    def predictions(self, policy: str, set_name: str) -> list[dict[str, Any]]:
        """The stored rows of one policy and set."""
        return self._predictions(policy, set_name).load()

    def timings(self, policy: str, set_name: str) -> list[dict[str, Any]]:
        """The timings of the stored rows of one policy and set, in order."""
        # A kill between the two appends leaves a timing that the resumed run writes again.
        by_index = {row["index"]: row for row in self._timings(policy, set_name).load()}
        return [by_index[i] for i in range(self._counts[policy, set_name]) if i in by_index]

    def write_result(
        self, scores: Scores, averages: Sequence[Average] = (), digits: int = 2
    ) -> dict[str, Any]:
        """Writes `result.json` from the rows' scores, and each policy's own for official tools.

        Args:
            scores: policy -> set -> score of each row, 0 to 100.
            averages: means over sets that are wanted.
            digits: decimals.

        Returns:
            See `uncertainty.summarise`.
        """
        result = summarise(scores, averages, digits)
        for policy, score in result["score"].items():
            write_atomic(self.folder / "pred" / policy / "result.json", dump_json(score))
        write_atomic(self.folder / "result.json", dump_json(result))
        return result

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """Writes `run_meta.json`: the configuration, its fingerprint and the given facts."""
        content = {"fingerprint": fingerprint(self.config), "config": self.config, **meta}
        write_atomic(self.folder / "run_meta.json", dump_json(content))

    def read_meta(self) -> dict[str, Any]:
        """What `run_meta.json` says now; empty without the file."""
        path = self.folder / "run_meta.json"
        if not path.exists():
            return {}
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(meta["config"], dict):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged; choose another --out") from error
        return dict(meta)

    def _check_config(self) -> None:
        meta = self.read_meta()
        if meta:
            growing = self._growing or ""
            added = {*self.config.get(growing, ())} - {*meta["config"].get(growing, ())}
            keys = [
                key
                for key in differing_keys(meta["config"], self.config)
                if not any(key.endswith(f".{one}") for one in added)
            ]
            if keys:
                raise UserError(
                    f"--out {self.folder} holds another configuration (it differs in: "
                    f"{', '.join(keys)}); choose another folder"
                )
        elif (self.folder / "pred").exists():
            raise UserError(f"--out {self.folder} holds predictions but no run_meta.json")

    def _predictions(self, policy: str, set_name: str) -> RowFile:
        return RowFile(self.folder / "pred" / policy / f"{set_name}.jsonl")

    def _timings(self, policy: str, set_name: str) -> RowFile:
        return RowFile(self.folder / "timing" / policy / f"{set_name}.jsonl")
