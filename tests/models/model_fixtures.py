"""Finds the checkpoints and golden values that the tests run over.

Any folder of the format serves: nothing here knows one by name.
"""

import os
from pathlib import Path

import pytest

FIXTURES = Path(
    os.environ.get("RESTKV_FIXTURES_DIR", Path(__file__).resolve().parents[1] / "fixtures")
)


def checkpoints(pattern: str, *, wants: str = "config.json") -> list:
    """Parameters for a test: folders of the fixtures that hold a file `wants`."""
    folders = sorted(path.parent for path in FIXTURES.glob(f"{pattern}/{wants}"))
    assert folders, f"no {pattern}/{wants} in {FIXTURES}"
    return [pytest.param(folder, id=folder.name) for folder in folders]
