"""`python -m experiments.suite`: a fixed selection of the benchmarks, and one report of them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.core.environment import environment, package_version
from experiments.core.errors import UserError, run_main
from experiments.core.plots import require_matplotlib
from experiments.core.results import ResultStore, folder_name
from experiments.core.storage import dump_json, write_atomic
from experiments.suite.cli import build_parser, model_folders
from experiments.suite.collect import collect
from experiments.suite.page import render
from experiments.suite.parts import Part, parts_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    models = model_folders(args.model)
    if not args.no_plots:
        require_matplotlib()
    # Models and parts may join later; what there is of others stays as it is.
    config = {
        "benchmark": "suite",
        "quick": args.quick,
        "dtype": args.dtype,
        "seed": args.seed,
        "version": package_version("restkv-jax"),
    }
    out = args.out or Path("results") / folder_name(
        "suite-quick" if args.quick else "suite", config
    )
    with ResultStore.open(out, config) as store:
        facts = environment()
        store.write_meta({"environment": facts})
        report: dict[str, Any] = {"quick": args.quick, "environment": facts, "models": []}
        failed = run_parts(args, models, out, report)
    print(f"report: {out / 'report.html'}")
    if failed:
        raise UserError(f"{len(failed)} parts were not run: {'; '.join(failed)}")
    return 0


def run_parts(
    args: argparse.Namespace, models: dict[str, str], out: Path, report: dict[str, Any]
) -> list[str]:
    """Runs every part on every model, and writes the report after each.

    Args:
        args: the parsed options.
        models: folder -> model.
        out: the suite's folder.
        report: filled, see `suite.json`.

    Returns:
        The parts that failed, each with its reason; not those that lack an extra.
    """
    failed = []
    for folder, model in models.items():
        entries: list[dict[str, Any]] = []
        report["models"].append({"name": model, "folder": folder, "parts": entries})
        for part in parts_of(args.parts, quick=args.quick):
            own = f"{folder}/{part.name}"
            arguments = arguments_of(part, model, out / own, args)
            command = shlex.join(["python", "-m", f"experiments.{part.benchmark}", *arguments])
            print(f"{model}, {part.name}\n  {command}", flush=True)
            entry: dict[str, Any] = {
                "name": part.name,
                "about": part.about,
                "command": command,
                "error": None,
            }
            started = time.monotonic()
            missing = part.needs is not None and importlib.util.find_spec(part.needs) is None
            try:
                if missing:
                    raise UserError(f'needs {part.needs} (pip install "restkv-jax[eval]")')
                importlib.import_module(f"experiments.{part.benchmark}.__main__").main(arguments)
            except UserError as error:
                entry["error"] = " ".join(str(error).split())
                if not missing:  # what an extra would add is no part of a run without it
                    failed.append(f"{own}: {entry['error']}")
            else:
                entry |= collect(part, out, own, plots=not args.no_plots)
            seconds = round(time.monotonic() - started, 1)
            print(f"{model}, {part.name}: {seconds} s", flush=True)
            entries.append(entry)
            write_atomic(out / "suite.json", dump_json(report))
            write_atomic(out / "report.html", render(report, out))
        # Programs of one model are of no use to the next, and every one holds memory maps.
        jax.clear_caches()
    return failed


def arguments_of(part: Part, model: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The part's own command line."""
    return [
        *("--model", model, "--out", str(folder), *part.options),
        *(text for policy in part.policies for text in ("--policy", policy)),
        *("--dtype", args.dtype, "--seed", str(args.seed)),
        *(("--no-plots",) if args.no_plots and part.figures else ()),
    ]


if __name__ == "__main__":
    sys.exit(run_main(main))
