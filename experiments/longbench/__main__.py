"""`python -m experiments.longbench`: eviction policies on LongBench, or on the offline suite."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.core.errors import run_main
from experiments.core.program import (
    Benchmark,
    Generation,
    announce,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.uncertainty import Average
from experiments.longbench.buckets import write_buckets
from experiments.longbench.cli import (
    TEMPLATE_ROOM,
    build_parser,
    load_sets,
    longest_text,
    prompting_of,
)
from experiments.longbench.metrics import score_prediction

_OFFLINE_NOTES = (
    "This is the OFFLINE SUITE, generated from Python's own texts: NOT LongBench.",
    "The real benchmark: --data hub, or --data DIR with its .jsonl files.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    language_model = load_model(args)
    tokenizer = language_model.tokenizer
    sets, title = load_sets(args, lambda text: len(tokenizer.encode(text)))
    max_length = longest_text(
        args,
        language_model.config.max_length,
        answer=max(task.spec.max_new_tokens for task in sets),
        chat=args.protocol == "official",
    )
    prompting = prompting_of(args, language_model, max_length)
    announce(language_model, sets, _OFFLINE_NOTES if args.data == "offline" else ())
    names = tuple(task.spec.name for task in sets)
    benchmark = Benchmark(
        name="longbench",
        title=title,
        sets=sets,
        averages=[Average("mean of sets", names)] if len(names) > 1 else [],
        how=Generation(prompting=prompting, longest_prompt=max_length + TEMPLATE_ROOM),
        score=score_prediction,
        finish=lambda store, scores: write_buckets(store, scores, sets) if args.longbench_e else (),
        settings={
            "data": args.data if args.data in ("offline", "hub") else "folder",
            "prompts": args.prompts,
            "protocol": args.protocol,
            "max_length": prompting.max_length,
        },
    )
    return run_benchmark(args, language_model, policies, benchmark)


if __name__ == "__main__":
    sys.exit(run_main(main))
