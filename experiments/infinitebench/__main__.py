"""`python -m experiments.infinitebench`: eviction policies on InfiniteBench's tasks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from experiments.core.errors import UserError, run_main
from experiments.core.generated import (
    made_to_measure,
    mode_of,
    prompt_settings,
    uncut_prompts,
)
from experiments.core.program import (
    Benchmark,
    Generation,
    announce,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Average
from experiments.infinitebench.cli import build_parser
from experiments.infinitebench.data import load_sets
from experiments.infinitebench.metrics import score_prediction
from experiments.infinitebench.synthetic import GENERATED, build_sets
from experiments.infinitebench.tasks import ONLY_IF_NAMED, TASKS
from experiments.longbench.cli import TEMPLATE_ROOM, longest_text


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
    if offline:
        measure, how = made_to_measure(args, language_model)
        sets = build_sets(names, measure)
    else:
        sets = load_sets(
            names,
            args.data,
            limit=args.limit,
            explicit=args.tasks is not None,
            chat=args.template == "chat",
        )
        text = longest_text(
            args,
            language_model.config.max_length,
            answer=max(task.spec.max_new_tokens for task in sets),
            chat=args.template == "chat",
        )
        uncut = uncut_prompts(language_model, query_agnostic=args.query_agnostic)
        how = Generation(
            prompting=dataclasses.replace(uncut, max_length=text),
            longest_prompt=text + TEMPLATE_ROOM,
        )
    announce(language_model, sets, [])
    kind = "generated" if offline else "its rows"
    benchmark = Benchmark(
        name="infinitebench",
        title=f"InfiniteBench ({kind}, own wordings, {mode_of(args)}), score 0-100",
        sets=sets,
        averages=_averages(sets),
        how=how,
        score=score_prediction,
        settings={**prompt_settings(args), "max_length": how.prompting.max_length},
    )
    return run_benchmark(args, language_model, policies, benchmark)


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
