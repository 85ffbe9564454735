"""`python -m experiments.infinitebench`: eviction policies on InfiniteBench's tasks."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from experiments.core.errors import UserError, run_main
from experiments.core.program import (
    Benchmark,
    Generation,
    announce,
    check_length,
    generated_prompts,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import Row, SetSpec, TaskSet
from experiments.core.uncertainty import Average
from experiments.infinitebench.cli import build_parser
from experiments.infinitebench.data import load_sets
from experiments.infinitebench.metrics import score_prediction
from experiments.infinitebench.synthetic import GENERATED, build_sets
from experiments.infinitebench.tasks import ONLY_IF_NAMED, TASKS
from experiments.longbench.cli import TEMPLATE_ROOM, longest_text
from models import LanguageModel


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    offline = args.data == "offline"
    names = args.tasks or tuple(name for name in TASKS if name not in ONLY_IF_NAMED)
    if offline:
        missing = [name for name in names if name not in GENERATED]
        if missing and args.tasks is not None:
            raise UserError(f"--tasks {missing[0]}: needs its rows, --data hub or --data DIR")
        names = tuple(name for name in names if name in GENERATED)
    language_model = load_model(args)
    prompting = generated_prompts(language_model, query_agnostic=args.query_agnostic)
    if offline:
        sets, longest = _generate(args, names, language_model, prompting)
    else:
        sets = load_sets(
            names,
            args.data,
            limit=args.limit,
            explicit=args.tasks is not None,
            chat=args.template == "chat",
        )
        text = longest_text(args, language_model.config.max_length)
        prompting = dataclasses.replace(prompting, max_length=text)
        longest = text + TEMPLATE_ROOM
    announce(language_model, sets, [])
    mode = "query-agnostic" if args.query_agnostic else "query-aware"
    kind = "generated" if offline else "its rows"
    benchmark = Benchmark(
        name="infinitebench",
        title=f"InfiniteBench ({kind}, own wordings, {mode}), score 0-100",
        sets=sets,
        averages=_averages(sets),
        how=Generation(prompting=prompting, longest_prompt=longest),
        score=score_prediction,
        settings={
            "template": args.template,
            "query_agnostic": args.query_agnostic,
            "max_length": prompting.max_length,
        },
    )
    return run_benchmark(args, language_model, policies, benchmark)


def _generate(
    args: argparse.Namespace,
    names: tuple[str, ...],
    language_model: LanguageModel,
    prompting: Prompting,
) -> tuple[list[TaskSet], int]:
    """The sets, and the longest prompt."""
    longest = max(args.lengths)
    check_length("--lengths", longest, language_model)

    def count(spec: SetSpec, row: Row) -> int:
        return len(build_prompt(row, spec, language_model.tokenizer, prompting).ids)

    sets = build_sets(
        names,
        lengths=args.lengths,
        rows=min(args.rows, args.limit or args.rows),
        seed=args.seed,
        chat=args.template == "chat",
        count=count,
    )
    return sets, longest


def _averages(sets: Sequence[TaskSet]) -> list[Average]:
    """The mean over the tasks, for each length if they are generated."""
    by_length: dict[str, list[str]] = {}
    for task in sets:
        length = task.spec.name.rpartition("/")[0]
        by_length.setdefault(length, []).append(task.spec.name)
    return [
        Average((f"{length}: " if length else "") + f"mean of these {len(names)} tasks", (*names,))
        for length, names in by_length.items()
        if len(names) > 1
    ]


if __name__ == "__main__":
    sys.exit(run_main(main))
