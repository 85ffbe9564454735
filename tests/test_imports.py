"""Imports run one way: pallas_kernels <- restkv_jax <- models <- experiments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("pallas_kernels", "restkv_jax", "models", "experiments")
# What a package may import besides itself, those below it and the standard library.
ONLY_JAX = {"pallas_kernels", "restkv_jax"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ORDER)
def test_no_package_imports_one_above_it(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    above = ORDER[ORDER.index(package) + 1 :]
    for path in files:
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & set(above), path
        assert not names & {"torch", "transformers", "tests"}, path
        assert not {name for name in imported(path) if name.startswith("jax._src")}, path
        if package in ONLY_JAX:
            assert not names & {"flax", "numpy.testing", "rich", "safetensors"}, path
