"""Heat maps and lines, written as PNG. matplotlib is an optional dependency."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.core.errors import UserError
from experiments.core.storage import write_atomic


def require_matplotlib() -> None:
    """Says how plots can be had, before a long run finds out that they cannot.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            'plots need matplotlib: pip install "restkv-jax[plot]", or give --no-plots'
        ) from None


def heat_map(
    path: Path,
    values: np.ndarray,
    *,
    title: str,
    label: str,
    names: tuple[str, str] = ("layer", "head"),
    ticks: tuple[Sequence[str], Sequence[str]] | None = None,
    best: float | None = None,
) -> None:
    """Draws a square for each value; NaN is left white, 0 is always the same colour.

    Args:
        path: the PNG file.
        values: [R, C], rows by columns.
        title: above the map.
        label: what the colours mean.
        names: of rows and columns.
        ticks: what to write at each row, the first one on top, and at each column; None numbers
            them, row 0 at the bottom.
        best: the greenest value, 0 being the reddest; None leaves colours without a judgement.
    """
    rows, columns = values.shape
    size = (1.5 + 0.35 * max(columns, 8), 1.2 + 0.22 * max(rows, 8))
    with _axes(path, size) as (figure, axes):
        image = axes.imshow(
            values,
            aspect="auto",
            origin="lower" if ticks is None else "upper",
            vmin=0.0,
            vmax=best,
            cmap="viridis" if best is None else "RdYlGn",
        )
        axes.set(title=title, ylabel=names[0], xlabel=names[1])
        if ticks is None:
            axes.locator_params(integer=True)
        else:
            axes.set_yticks(np.arange(rows), ticks[0])
            axes.set_xticks(np.arange(columns), ticks[1], rotation=45)
        figure.colorbar(image, ax=axes, label=label)


def lines(
    path: Path,
    series: Mapping[str, np.ndarray],
    *,
    title: str,
    label: str,
    axis: str = "layer",
    at: np.ndarray | Mapping[str, np.ndarray] | None = None,
    errors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Draws one line for each name; a point where a name has one value.

    Args:
        path: the PNG file.
        series: name -> [L] values.
        title: above the plot.
        label: what the values are.
        axis: what they are counted by.
        at: [L] where they are on the axis, for all names or for each; at 0, 1, 2, ... by default.
        errors: name -> [L] half the height of each value's error bar, or [2, L] how far it goes
            down and up.
    """
    with _axes(path, (7.0, 4.0)) as (_, axes):
        for name, values in series.items():
            places = at.get(name) if isinstance(at, Mapping) else at
            axes.errorbar(
                np.arange(len(values)) if places is None else places,
                values,
                yerr=None if errors is None else errors[name],
                marker=".",
                label=name,
                capsize=2,
            )
        axes.set(title=title, xlabel=axis, ylabel=label, ylim=(0.0, None))
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()


@contextlib.contextmanager
def _axes(path: Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure without a window, written when its drawing is done."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    yield figure, figure.add_subplot()
    buffer = io.BytesIO()
    # Nothing that differs from run to run, such as the library's version.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
