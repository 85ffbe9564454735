"""`python -m experiments.ruler`: eviction policies on RULER's 13 tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from experiments.core.errors import run_main
from experiments.core.generated import made_to_measure, mode_of, prompt_settings
from experiments.core.program import (
    Benchmark,
    announce,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.results import asked
from experiments.core.tasks import Row
from experiments.ruler.cli import build_parser
from experiments.ruler.official import official_wordings
from experiments.ruler.scoring import score_prediction
from experiments.ruler.sources import Sources
from experiments.ruler.summary import write_summaries
from experiments.ruler.tasks import TASKS, averages_of, build_sets
from experiments.ruler.wordings import OWN


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    wordings = official_wordings() if args.prompts == "official" else OWN
    sources = Sources(args.data)
    language_model = load_model(args)
    measure, how = made_to_measure(args, language_model)
    names = args.tasks or list(TASKS)
    sets, notes = build_sets(
        names, sources, measure, explicit=args.tasks is not None, wordings=wordings
    )
    announce(language_model, sets, notes)
    benchmark = Benchmark(
        name="ruler",
        title=f"RULER's tasks ({args.prompts} wordings, {mode_of(args)}), score 0-100",
        sets=sets,
        averages=averages_of(sets),
        how=how,
        score=score_prediction,
        record=prediction_row,
        finish=lambda store, scores: write_summaries(store, scores, sets),
        settings={"prompts": args.prompts, **prompt_settings(args)},
    )
    return run_benchmark(args, language_model, policies, benchmark)


def prediction_row(row: Row, index: int, prediction: str) -> dict[str, Any]:
    """A line in RULER's format; `input` is the question alone."""
    return {
        "index": index,
        "pred": prediction,
        **asked(row),
        "outputs": list(row.answers),
        "others": dict(row.others or {}),
        "truncation": -1,
        "length": row.length,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
