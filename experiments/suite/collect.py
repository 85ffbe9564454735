"""What the results folders of the parts say, as one JSON value."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.core.plots import lines
from experiments.core.storage import RowFile
from experiments.core.table import read_markdown
from experiments.suite.parts import Part

# Of a run's own settings and surroundings; the report names the command that they follow from.
_NOT_RESULTS = ("run_meta.json",)


def collect(part: Part, out: Path, folder: str, *, plots: bool) -> dict[str, Any]:
    """All that is reported of a finished part.

    Args:
        part: what was run.
        out: the suite's folder.
        folder: the part's results folder in it.
        plots: whether to draw the curve of scores over bytes.

    Returns:
        "tables": title, columns and rows of text; "results": the folder's JSON files by name;
        "curve": of parts that have one, see `curve`; "figures": pictures, relative to `out`.
    """
    own = out / folder
    entry: dict[str, Any] = {
        "tables": [
            dataclasses.asdict(table)
            for table in read_markdown((own / "table.md").read_text(encoding="utf-8"))
        ],
        "results": {
            path.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(own.glob("*.json"))
            if path.name not in _NOT_RESULTS
        },
    }
    figures = [path for pattern in part.figures for path in sorted(own.glob(pattern))]
    if part.curve:
        entry["curve"] = curve(part, own, entry["results"]["result.json"])
        if plots:
            figures.append(own / "curve.png")
            draw_curve(figures[-1], entry["curve"])
    entry["figures"] = [path.relative_to(out).as_posix() for path in figures] if plots else []
    return entry


def curve(part: Part, folder: Path, result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Scores over the bytes of the cache.

    Args:
        part: its policies, at several budgets.
        folder: its results folder.
        result: the content of its `result.json`.

    Returns:
        Policy without its budget -> its points by bytes: "policy" with the budget, "bytes" (mean
        over the prompts of what the cache occupies), "score" and "standard_error" of the first
        average, or of the set where there is one alone.
    """
    averages = list(result["averages"].values())
    found: dict[str, list[dict[str, Any]]] = {}
    for family, labels in part.families().items():
        points = []
        for label in labels:
            score, error = (
                averages[0][of][label] if averages else next(iter(result[of][label].values()))
                for of in ("score", "standard_error")
            )
            points.append(
                {
                    "policy": label,
                    "bytes": _cache_bytes(folder / "timing" / label),
                    "score": score,
                    "standard_error": error,
                }
            )
        found[family] = sorted(points, key=lambda point: point["bytes"])
    return found


def draw_curve(path: Path, families: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draws the lines of `curve`, with standard errors where there are any."""
    lines(
        path,
        {name: _column(points, "score") for name, points in families.items()},
        title="score over cache size, mean ± standard error",
        label="score, 0-100",
        axis="KiB of cache for a prompt",
        at={name: _column(points, "bytes") / 1024 for name, points in families.items()},
        errors={
            name: np.nan_to_num(_column(points, "standard_error"))
            for name, points in families.items()
        },
    )


def _column(points: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.asarray([point[name] for point in points], float)


def _cache_bytes(folder: Path) -> float:
    """Mean over the rows of all sets; a row that a kill made run twice counts once."""
    sizes = [
        row["cache_bytes"]
        for path in sorted(folder.rglob("*.jsonl"))
        for row in {row["index"]: row for row in RowFile(path).load()}.values()
    ]
    return round(statistics.fmean(sizes), 1)
