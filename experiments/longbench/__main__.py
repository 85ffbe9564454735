"""`python -m experiments.longbench`: eviction policies on LongBench, or on the offline suite."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
from experiments.core.engine import EvictionEngine
from experiments.core.environment import environment, package_version
from experiments.core.errors import UserError, run_main
from experiments.core.options import PolicyText, chosen_policies
from experiments.core.plans import make_plan, make_policy
from experiments.core.results import folder_name
from experiments.core.runner import Prompting
from experiments.core.session import describe_sets, run_session
from experiments.core.table import print_tables
from experiments.core.tasks import TaskSet
from experiments.longbench.cli import build_parser, load_sets
from experiments.longbench.metrics import score_prediction
from restkv_jax.decode import weights_fingerprint

_DEFAULT_MODEL = "smollm2-135m-instruct"
# The chat template's own tokens come on top of a prompt of `--max-length`.
_TEMPLATE_ROOM = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = chosen_policies(args.policy)
    for policy in policies:  # cheap complaints first: before anything is downloaded
        make_plan(policy, args.budget, headroom=0)
    language_model = _load(args.model or _DEFAULT_MODEL, args.dtype)
    max_length = _max_length(args, language_model.config.max_length)
    tokenizer = language_model.tokenizer
    sets, title = load_sets(args, lambda text: len(tokenizer.encode(text)))
    _announce(args, language_model, sets)
    config = _config(args, language_model, policies, sets, max_length)
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
            longest_prompt=max_length + _TEMPLATE_ROOM,
            weights_bytes=language_model.weights_bytes,
        ),
        tokenizer=tokenizer,
        prompting=Prompting(
            protocol=args.protocol,
            max_length=max_length,
            eos_ids=language_model.eos_ids,
            turn_end_ids=language_model.turn_end_ids,
            inst_style="llama-2" in language_model.name.lower(),
        ),
        score=score_prediction,
        seed=args.seed,
    )
    print_tables(tables)
    print(f"results: {folder}")
    return 0


def _load(spec: str, dtype: str) -> models.LanguageModel:
    try:
        return models.load(spec, dtype=dtype)
    except models.CheckpointError as error:
        raise UserError(f"--model: {error}") from None


def _max_length(args: argparse.Namespace, context: int | None) -> int:
    """Longest prompt: what is asked for, else what the model holds beside an answer."""
    if args.max_length is not None:
        if context is not None and args.max_length > context:
            raise UserError(f"--max-length {args.max_length}: the model holds {context} tokens")
        return args.max_length
    return 4096 if context is None else max(context - 2 * _TEMPLATE_ROOM, context // 2)


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
        "policies": {
            policy.label: {
                "name": policy.name,
                **dataclasses.asdict(make_policy(policy)),
                "budget": args.budget.value if make_policy(policy).needs_budget else None,
            }
            for policy in policies
        },
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
