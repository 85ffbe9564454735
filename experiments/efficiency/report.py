"""The table of a run, and its plots of latency and memory against the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.core import plots
from experiments.core.table import TextTable, human_bytes

_COLUMNS = (
    "length x batch, policy",
    "first token s",
    "of floor",
    "score ms",
    "evict ms",
    "of dense",
    "ms/token",
    "of floor",
    "tokens/s",
    "x full",
    "cache",
    "peak",
)

# Name of the plot, what is drawn, its factor, and its label.
_PLOTS = (
    ("first_token", "ttft_s", 1.0, "seconds to the first token"),
    ("token", "token_s", 1e3, "milliseconds a decoded token"),
    ("memory", "peak_bytes", 1e-9, "peak memory in GB"),
)


def peak_bytes(cell: Mapping[str, Any]) -> int:
    """Of prefill and decoding together, by what was compiled."""
    return max(int(cell["prefill_bytes"]), int(cell["decode_bytes"]))


def table(cells: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> TextTable:
    """One line a cell.

    Args:
        cells: as the results hold them; those that were refused say so.
        dense: seconds of a prefill that keeps nothing, by "LENGTHxBATCH".
    """
    full = {_place(c): c["baseline_token_s"] for c in cells if "baseline_token_s" in c}
    rows = []
    for cell in cells:
        name = f"{_place(cell)}, {cell['policy']}"
        if "refused" in cell:
            rows.append((name, "refused", *[""] * (len(_COLUMNS) - 2)))
            continue
        chosen = cell["score_s"] + cell["evict_s"]
        baseline = full.get(_place(cell))
        rows.append(
            (
                name,
                f"{cell['ttft_s']:.3f}",
                f"{100 * cell['ttft_floor_s'] / cell['ttft_s']:.0f} %",
                f"{1e3 * cell['score_s']:.2f}",
                f"{1e3 * cell['evict_s']:.2f}",
                f"{100 * chosen / dense[_place(cell)]:.2f} %",
                f"{1e3 * cell['token_s']:.3f}",
                f"{100 * cell['token_floor_s'] / cell['token_s']:.0f} %",
                f"{cell['tokens_per_s']:.1f}",
                "-" if baseline is None else f"{baseline / cell['token_s']:.2f}",
                human_bytes(cell["cache_bytes"]),
                human_bytes(peak_bytes(cell)),
            )
        )
    return TextTable("prefill, scoring, eviction and decoding", _COLUMNS, tuple(rows))


def write_plots(folder: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """A PNG of each batch for the first token, a decoded token and memory."""
    ran = [{**c, "peak_bytes": peak_bytes(c)} for c in cells if "refused" not in c]
    for batch in dict.fromkeys(cell["batch"] for cell in ran):
        own = [cell for cell in ran if cell["batch"] == batch]
        lengths = sorted({cell["length"] for cell in own})
        for name, field, factor, label in _PLOTS:
            series = {
                policy: np.full(len(lengths), np.nan)
                for policy in dict.fromkeys(cell["policy"] for cell in own)
            }
            for cell in own:
                series[cell["policy"]][lengths.index(cell["length"])] = factor * cell[field]
            plots.lines(
                folder / f"{name}_batch{batch}.png",
                series,
                title=f"batch {batch}",
                label=label,
                axis="tokens of the prompt",
                at=np.asarray(lengths),
            )


def _place(cell: Mapping[str, Any]) -> str:
    return f"{cell['length']}x{cell['batch']}"
