"""Finds the checkpoints and golden values that the tests run over.

Any folder of the format serves: nothing here knows one by name.
"""

import json
import os
from pathlib import Path

import pytest

FIXTURES = Path(
    os.environ.get("RESTKV_FIXTURES_DIR", Path(__file__).resolve().parents[1] / "fixtures")
)
SUPPORTED = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
}


def checkpoints(pattern: str, *, wants: str = "config.json") -> list:
    """Parameters for a test: folders of the fixtures that hold a file `wants`.

    Those of an architecture that is still to come are expected to be refused, loudly.
    """
    folders = sorted(path.parent for path in FIXTURES.glob(f"{pattern}/{wants}"))
    assert folders, f"no {pattern}/{wants} in {FIXTURES}"
    return [pytest.param(folder, id=folder.name, marks=_marks(folder)) for folder in folders]


def _marks(folder: Path) -> list:
    from models import CheckpointError

    try:
        architectures = json.loads((folder / "config.json").read_text())["architectures"]
    except (FileNotFoundError, ValueError):
        return []
    if set(architectures) <= SUPPORTED:
        return []
    return [pytest.mark.xfail(strict=True, raises=CheckpointError, reason="not supported yet")]
