"""`python -m experiments.longbench`: eviction policies on LongBench, or on the offline suite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
from experiments.core.engine import EvictionEngine
from experiments.core.environment import environment, package_version
from experiments.core.errors import run_main
from experiments.core.options import PolicyText
from experiments.core.plans import describe_policies, make_plan
from experiments.core.program import load_model, read_policies
from experiments.core.results import folder_name
from experiments.core.session import describe_sets, run_session
from experiments.core.table import print_tables
from experiments.core.tasks import TaskSet
from experiments.longbench.cli import TEMPLATE_ROOM, build_parser, load_sets, prompting_of
from experiments.longbench.metrics import score_prediction
from restkv_jax.decode import weights_fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    language_model = load_model(args)
    prompting = prompting_of(args, language_model)
    tokenizer = language_model.tokenizer
    sets, title = load_sets(args, lambda text: len(tokenizer.encode(text)))
    _announce(args, language_model, sets)
    config = _config(args, language_model, policies, sets, prompting.max_length)
    headroom = max(task.spec.max_new_tokens for task in sets)
    plans = {policy.label: make_plan(policy, args.budget, headroom=headroom) for policy in policies}
    readable = f"longbench-{Path(language_model.name).name}-{args.budget}"
    folder = args.out or Path("results") / folder_name(readable, config)
    tables = run_session(
        folder=folder,
        config=config,
        environment=environment(),
        title=title,
        sets=sets,
        policies=list(plans),
        make_engine=lambda: EvictionEngine(
            language_model.model,
            plans,
            longest_prompt=prompting.max_length + TEMPLATE_ROOM,
            weights_bytes=language_model.weights_bytes,
        ),
        tokenizer=tokenizer,
        prompting=prompting,
        score=score_prediction,
        seed=args.seed,
    )
    print_tables(tables)
    print(f"results: {folder}")
    return 0


def _announce(
    args: argparse.Namespace, language_model: models.LanguageModel, sets: Sequence[TaskSet]
) -> None:
    """Says loudly what is measured, and how to measure the real thing."""
    rows = sum(len(task.rows) for task in sets)
    print(f"model:  {language_model.name}, {language_model.weights_bytes / 1e6:.0f} MB of weights")
    print(f"data:   {', '.join(task.spec.name for task in sets)} ({rows} rows)")
    if args.data == "offline":
        print(
            "        This is the OFFLINE SUITE, generated from Python's own texts: NOT LongBench.\n"
            "        The real benchmark: --data hub, or --data DIR with its .jsonl files."
        )
    sys.stdout.flush()


def _config(
    args: argparse.Namespace,
    language_model: models.LanguageModel,
    policies: Sequence[PolicyText],
    sets: Sequence[TaskSet],
    max_length: int,
) -> dict[str, Any]:
    """Everything that influences a prediction: rows are only reused where all of it is equal."""
    return {
        "benchmark": "longbench",
        "model": language_model.name,
        "weights": weights_fingerprint(language_model.model),
        "dtype": args.dtype,
        "policies": describe_policies(policies, args.budget),
        "data": args.data if args.data in ("offline", "hub") else "folder",
        "prompts": args.prompts,
        "protocol": args.protocol,
        "max_length": max_length,
        "seed": args.seed,
        "version": package_version("restkv-jax"),
        "sets": describe_sets(sets),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
