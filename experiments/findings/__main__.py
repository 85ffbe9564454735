"""`python -m experiments.findings`: policies and allocations on generated tasks, equal budgets.

Every sample is one row file entry in the results folder; the same command goes on where an
interrupted one stopped. `table.md` there holds the tables of all samples so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import models
from experiments.core.compiled import keep_compiled_programs
from experiments.core.errors import UserError, run_main
from experiments.core.options import Parser, count_of
from experiments.core.storage import RowFile, locked, write_atomic
from experiments.core.table import markdown
from experiments.findings.cells import cells
from experiments.findings.measure import measure
from experiments.findings.report import tables
from experiments.findings.samples import TASKS, calibration_text, make_sample
from restkv_jax.decode import CausalLM, HeadBudgets, calibrate_head_budgets, with_output_factors

MODES = ("agnostic", "inside")
# Entries a head for which shares are measured, as parts of the text.
_PARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def calibrate(
    model: CausalLM, texts: dict[str, Any], folder: Path, length: int
) -> dict[str, HeadBudgets]:
    """The calibrated budgets of a model, read from the folder where they are there already."""
    # A sixteenth of a short text may not hold what is forced.
    budgets = [b for b in (round(part * length) for part in _PARTS) if b > 16]
    found = {}
    for name, by in (
        ("attention", "attention"),
        ("random", "attention"),
        ("reconstruction", "reconstruction"),
    ):
        path = folder / f"calibration-{name}.json"
        if not path.exists():
            start = time.monotonic()
            try:
                made = calibrate_head_budgets(
                    model,
                    texts["random" if name == "random" else "prose"],
                    budget=budgets,
                    by=by,  # type: ignore[arg-type]
                )
            except ValueError as error:
                raise UserError(f"--calibration-length {length}: {error}") from None
            made.save(path)
            print(f"calibrated by {name}: {time.monotonic() - start:.0f} s", flush=True)
        found[name] = HeadBudgets.load(path, model)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    parser = Parser(prog="python -m experiments.findings", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results folder")
    parser.add_argument("--lengths", default="512,1024", metavar="T,T", help="tokens of a context")
    parser.add_argument("--budgets", default="64,128,256", metavar="B,B", help="entries a KV head")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--modes", default=",".join(MODES), metavar="A,B")
    parser.add_argument(
        "--samples", type=count_of("--samples", 1), default=8, metavar="N", help="of each task"
    )
    parser.add_argument(
        "--calibration-length", type=count_of("--calibration-length", 128), default=512, metavar="T"
    )
    args = parser.parse_args(argv)
    lengths, budgets = (_numbers(args, name) for name in ("lengths", "budgets"))
    tasks, modes = (_names(args, "tasks", tuple(TASKS)), _names(args, "modes", MODES))
    keep_compiled_programs()
    try:
        loaded = models.load(args.model)
    except models.CheckpointError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    model = with_output_factors(loaded.model)
    start = loaded.tokenizer.encode("")

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.encode(text)[len(start) :]

    with locked(args.out):
        size = args.calibration_length
        prose = calibration_text(size, encode, start)
        vocabulary = max(max(prose), 1000)
        random_ids = jax.random.randint(jax.random.key(0), (size,), 10, vocabulary)
        texts = {"prose": jnp.asarray([prose]), "random": random_ids[None]}
        calibrated = calibrate(model, texts, args.out, size)
        rows = RowFile(args.out / "samples.jsonl")
        done = {_key(row): row for row in rows.load()}
        wanted = [
            (length, seed, task, mode)
            for length in lengths
            for seed in range(args.samples)
            for task in tasks
            for mode in modes
            if task != "continuation" or mode == "agnostic"
        ]
        for length, seed, task, mode in wanted:
            if (length, seed, task, mode) in done:
                continue
            before = time.monotonic()
            inside = mode == "inside"
            sample = make_sample(task, seed, length, encode, start, inside=inside)
            found = measure(
                model,
                sample,
                inside=inside,
                pairs=cells(mode),
                budgets=[b for b in budgets if 2 * b <= length],
                calibrated=calibrated,
            )
            seconds = round(time.monotonic() - before, 2)
            row = {"length": length, "seed": seed, "task": task, "mode": mode}
            rows.append({**row, "seconds": seconds, "cells": found})
            print(f"{task} {mode} {length} #{seed}: {seconds} s, {found[0]}", flush=True)
        text = markdown(tables(rows.load()))
        write_atomic(args.out / "table.md", text)
        print(text)
    return 0


def _key(row: dict[str, Any]) -> tuple[int, int, str, str]:
    return row["length"], row["seed"], row["task"], row["mode"]


def _numbers(args: Any, name: str) -> list[int]:
    text = getattr(args, name)
    return [count_of(f"--{name}", 1)(part) for part in text.split(",")]


def _names(args: Any, name: str, known: tuple[str, ...]) -> list[str]:
    names = [part.strip() for part in getattr(args, name).split(",")]
    for one in names:
        if one not in known:
            raise UserError(f"--{name}: unknown {one!r}; known are {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(run_main(main))
