"""The notebooks run from top to bottom, on the tiny checkpoint, and show what their texts claim."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/fixtures/hf_tiny/qwen3_qknorm"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _tiny_and_quick(monkeypatch):
    monkeypatch.setenv("RESTKV_NOTEBOOK_MODEL", str(MODEL))
    # As tests/conftest.py has it: the kernel is a process of its own.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def run(name, folder):
    """Executes a notebook in a folder; its printed text, and how many pictures it shows."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    printed = "".join(out["text"] for out in outputs if out.get("name") == "stdout")
    return printed, sum("image/png" in out.get("data", {}) for out in outputs)


def test_quick_start(tmp_path):
    printed, _ = run("quick_start", tmp_path)
    sizes = dict(re.findall(r"^(\w+) +([0-9.]+) MiB", printed, re.M))
    assert list(sizes) == ["full", "streaming", "snapkv", "restkv"]
    assert sizes["streaming"] == sizes["snapkv"] == sizes["restkv"]
    assert float(sizes["full"]) > 4 * float(sizes["restkv"])
    errors = re.findall(r"^(\w+) +attention error ([0-9.]+) +KL ([0-9.]+)$", printed, re.M)
    error, kl = ({name: float(row[of]) for name, *row in errors} for of in (0, 1))
    assert error["full"] == kl["full"] == 0.0
    assert min(error[name] for name in ("streaming", "snapkv", "restkv")) > 0.0


def test_needle_heat_map(tmp_path):
    printed, pictures = run("needle_heat_map", tmp_path)
    assert pictures == 4
    assert "restkv+preset=robust" in printed
    assert (tmp_path / "results/notebook-needle-qwen3_qknorm/needle.json").exists()


def test_your_own_model(tmp_path):
    printed, _ = run("your_own_model", tmp_path)
    right = dict(re.findall(r"^(\w+) +[0-9.]+ KiB +([0-9]+)% right$", printed, re.M))
    assert list(right) == ["full", "streaming", "snapkv", "restkv"]
    assert min(int(right[name]) for name in ("full", "snapkv", "restkv")) >= 95
    assert int(right["streaming"]) < 50
    assert printed.count("traced") == 1


def test_sharding(tmp_path):
    printed, _ = run("sharding", tmp_path)
    assert "{'data': 4, 'model': 2}" in printed
    assert "q projection (64, 128) of which a device has (64, 64)" in printed
    difference = float(re.findall(r"one device: (\S+)", printed)[0])
    assert difference < 1e-4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs_and_with_a_way_to_install(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "pip install" in notebook.cells[0].source
    for cell in notebook.cells:
        assert "://" not in cell.source
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_index_names_all_of_them():
    index = (ROOT / "notebooks/README.md").read_text()
    assert len(NOTEBOOKS) == 4
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", index)) == {path.stem for path in NOTEBOOKS}
