"""Plots by layer and head, written as PNG. matplotlib is an optional dependency."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
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


def heat_map(path: Path, values: np.ndarray, *, title: str, label: str) -> None:
    """Draws a value for each layer and head; NaN is left white.

    Args:
        path: the PNG file.
        values: [L, N], layers by heads.
        title: above the map.
        label: what the colours mean.
    """
    layers, heads = values.shape
    with _axes(path, (1.5 + 0.35 * max(heads, 8), 1.2 + 0.22 * max(layers, 8))) as (figure, axes):
        # Every number has its own square, and 0 is always the same colour.
        image = axes.imshow(values, aspect="auto", origin="lower", vmin=0.0, cmap="viridis")
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label=label)


def lines(
    path: Path, series: Mapping[str, np.ndarray], *, title: str, label: str, axis: str = "layer"
) -> None:
    """Draws one line for each name.

    Args:
        path: the PNG file.
        series: name -> [L] values, from 0 on.
        title: above the plot.
        label: what the values are.
        axis: what they are counted by.
    """
    with _axes(path, (7.0, 4.0)) as (_, axes):
        for name, values in series.items():
            axes.plot(np.arange(len(values)), values, marker=".", label=name)
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
