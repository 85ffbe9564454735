"""The report: one HTML file that holds all it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATE = "report.html.jinja"


def render(report: Mapping[str, Any], out: Path) -> str:
    """The report as HTML; every text of it is escaped.

    Args:
        report: the content of `suite.json`.
        out: the suite's folder, which the pictures' paths are relative to.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def data_uri(path: str) -> str:
        return "data:image/png;base64," + base64.b64encode((out / path).read_bytes()).decode()

    return environment.get_template(_TEMPLATE).render(report=report, data_uri=data_uri)
