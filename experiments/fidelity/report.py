"""Measurements as JSON, as a table and as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.core.plots import heat_map, lines
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, markdown
from experiments.core.uncertainty import standard_error
from restkv_jax.decode import Fidelity

_BY_LAYER = {
    "attention": "relative error of attention outputs",
    "residual": "relative error of the residual stream",
    "overlap": "overlap with leave-one-out",
}
_BY_HEAD = {
    "attention_heads": "relative error of attention outputs",
    "overlap": "overlap with leave-one-out",
}


def write_report(folder: Path, measured: Mapping[str, Fidelity], *, plots: bool) -> TextTable:
    """Writes `fidelity.json`, `table.md` and the plots of a run.

    Args:
        folder: the results folder.
        measured: policy -> its measurement, a row for each prompt.
        plots: whether to write PNG files.

    Returns:
        The table.
    """
    content = {policy: describe(found) for policy, found in measured.items()}
    write_atomic(folder / "fidelity.json", dump_json(content))
    table = summary_table(measured)
    write_atomic(folder / "table.md", markdown([table]))
    if plots:
        _plot(folder, measured)
    return table


def describe(found: Fidelity) -> dict[str, Any]:
    """Means over the rows as plain JSON values; null where nothing was measured."""
    rows = [Fidelity(**_row(found, b)).summary() for b in range(found.hidden.shape[0])]
    errors = {
        name: standard_error([row[name] for row in rows if not math.isnan(row[name])])
        for name in rows[0]
    }
    content: dict[str, Any] = {
        "n": len(rows),
        "summary": {name: _plain(np.asarray(value)) for name, value in found.summary().items()},
        "standard_error": errors,
    }
    for name in ("attention_heads", "attention", "residual", "overlap", "kl", "top1"):
        values = getattr(found, name)
        content[name] = None if values is None else _plain(_mean_rows(values))
    return content


def summary_table(measured: Mapping[str, Fidelity]) -> TextTable:
    """Policy x mean of each measure."""
    columns = {
        "attention": "{:.4f}",
        "residual": "{:.4f}",
        "hidden": "{:.4f}",
        "kl": "{:.4f}",
        "largest_kl": "{:.3f}",
        "top1": "{:.1%}",
        "overlap": "{:.1%}",
    }
    rows = []
    for policy, found in measured.items():
        summary = found.summary()
        cells = (
            "-" if math.isnan(summary[name]) else form.format(summary[name])
            for name, form in columns.items()
        )
        rows.append((policy, *cells))
    names = ("policy", "attention", "residual", "hidden", "KL", "largest KL", "top-1", "overlap")
    count = next(iter(measured.values())).hidden.shape[0]
    title = f"difference from the full cache, means over {count} prompts"
    return TextTable(title, names, tuple(rows))


def _plot(folder: Path, measured: Mapping[str, Fidelity]) -> None:
    for name, label in _BY_LAYER.items():
        by_layer = {}
        for policy, found in measured.items():
            values = getattr(found, name)
            if values is not None and not np.isnan(values).all():
                mean = _mean_rows(values)
                by_layer[policy] = mean if mean.ndim == 1 else _mean_rows(mean.T)
        if by_layer:
            lines(folder / f"{name}.png", by_layer, title=label, label=label)
    for policy, found in measured.items():
        for name, label in _BY_HEAD.items():
            values = getattr(found, name)
            if not np.isnan(values).all():
                path = folder / f"{name}-{policy}.png"
                heat_map(path, _mean_rows(values), title=policy, label=label)


def _row(found: Fidelity, b: int) -> dict[str, Any]:
    return {
        name: None if values is None else values[b : b + 1] for name, values in vars(found).items()
    }


def _mean_rows(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, NaN left out; NaN where there is nothing else."""
    counted = ~np.isnan(values)
    total = np.sum(values, axis=0, where=counted)
    return np.where(counted.any(0), total / np.maximum(counted.sum(0), 1), np.nan)


def _plain(values: np.ndarray) -> Any:
    """Nested lists with 6 decimals, None for NaN."""
    if values.ndim == 0:
        return None if np.isnan(values) else round(float(values), 6)
    return [_plain(np.asarray(value)) for value in values]
