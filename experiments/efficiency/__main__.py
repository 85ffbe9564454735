"""`python -m experiments.efficiency`: what evicted caches cost, and what they save."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core import measure
from experiments.core.environment import environment
from experiments.core.errors import UserError, run_main
from experiments.core.options import chosen_policies
from experiments.core.plots import require_matplotlib
from experiments.core.results import differing_keys, folder_name
from experiments.core.storage import dump_json, locked, write_atomic
from experiments.core.table import human_bytes, markdown, print_tables
from experiments.efficiency.cells import CHUNK, Cell, DoesNotFit, compile_cell, make_cells
from experiments.efficiency.cli import build_parser
from experiments.efficiency.measure import dense_seconds, measure_cell
from experiments.efficiency.report import table, write_plots
from experiments.efficiency.subject import Subject, open_subject
from experiments.kernel_bench import Floor, measure_floor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    if not args.no_plots:
        require_matplotlib()
    cells = make_cells(args.lengths, args.batch, chosen_policies(args.policy), args.budget)
    tokens = CHUNK * (-(-args.tokens // CHUNK) + 1)  # the first call is not counted
    for cell in cells:
        cell.plan(tokens)
    subject = open_subject(args.model, args.dtype)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "device": jax.devices()[0].device_kind,
    }
    readable = f"efficiency-{Path(args.model).name}"
    folder = args.out or Path("results") / folder_name(readable, settings)
    with locked(folder):
        results = _open_results(folder / "results.json", settings)
        _run(args, subject, cells, tokens, results, folder)
        lines = [results["cells"][cell.key] for cell in cells]
        found = table(lines, results["dense"])
        write_atomic(folder / "table.md", markdown([found]))
        if not args.no_plots:
            write_plots(folder, lines)
    print_tables([found])
    for cell, line in zip(cells, lines, strict=True):
        if "refused" in line:
            print(f"{cell.key}: {line['refused']}")
    print(f"results: {folder}")
    return 0


def _open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs with these settings have measured."""
    if not path.exists():
        return {"settings": settings, "environment": environment(), "dense": {}, "cells": {}}
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        before = results["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to start over") from None
    differing = differing_keys(before, settings)
    if differing:
        raise UserError(f"--out: {path} was measured with another {', '.join(differing)}")
    return results


def _run(
    args: argparse.Namespace,
    subject: Subject,
    cells: Sequence[Cell],
    tokens: int,
    results: dict[str, Any],
    folder: Path,
) -> None:
    """Measures the cells that the results do not hold; they are written after each."""
    available = measure.device_memory()
    floor: Floor | None = None
    for cell in cells:
        if "token_s" in results["cells"].get(cell.key, {}):  # what was refused is tried again
            continue
        plan = cell.plan(tokens)
        print(f"{cell.key}: compiling", file=sys.stderr, flush=True)
        try:
            programs = compile_cell(subject, cell, plan, available)
            if floor is None:
                # Of activations: int8 is what weights are read as, not what prompts compute in.
                floor = measure_floor(str(jnp.dtype(subject.model.kv_dtype)))
                print(
                    f"{jax.devices()[0].device_kind}, {args.dtype}: "
                    f"{human_bytes(floor.bandwidth)}/s of memory, "
                    f"{floor.flops / 1e12:.2f} TFLOP/s of matrix products"
                )
            place = f"{cell.length}x{cell.batch}"
            if place not in results["dense"]:
                results["dense"][place] = dense_seconds(subject, cell, args.repeats)
            line = measure_cell(subject, cell, plan, programs, floor, args.repeats)
        except DoesNotFit as refusal:
            line = _refused(cell, str(refusal))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = _refused(cell, f"out of memory: {str(error).splitlines()[0]}")
        results["cells"][cell.key] = line
        write_atomic(folder / "results.json", dump_json(results))


def _refused(cell: Cell, why: str) -> dict[str, Any]:
    return {
        "length": cell.length,
        "batch": cell.batch,
        "policy": cell.name,
        "refused": why,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
