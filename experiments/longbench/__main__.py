"""`python -m experiments.longbench`: eviction policies on LongBench, or on the offline suite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments.core.errors import UserError, run_main
from experiments.core.program import (
    Benchmark,
    announce,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.runner import Prompting
from experiments.core.uncertainty import Average
from experiments.longbench.cli import build_parser, load_sets
from experiments.longbench.metrics import score_prediction

# The chat template's own tokens come on top of a prompt of `--max-length`.
_TEMPLATE_ROOM = 256
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
    max_length = _max_length(args, language_model.config.max_length)
    tokenizer = language_model.tokenizer
    sets, title = load_sets(args, lambda text: len(tokenizer.encode(text)))
    announce(language_model, sets, _OFFLINE_NOTES if args.data == "offline" else ())
    names = tuple(task.spec.name for task in sets)
    benchmark = Benchmark(
        name="longbench",
        title=title,
        sets=sets,
        averages=[Average("mean of sets", names)] if len(names) > 1 else [],
        prompting=Prompting(
            protocol=args.protocol,
            max_length=max_length,
            eos_ids=language_model.eos_ids,
            turn_end_ids=language_model.turn_end_ids,
            inst_style="llama-2" in language_model.name.lower(),
        ),
        longest_prompt=max_length + _TEMPLATE_ROOM,
        score=score_prediction,
        settings={
            "data": args.data if args.data in ("offline", "hub") else "folder",
            "prompts": args.prompts,
            "protocol": args.protocol,
            "max_length": max_length,
        },
    )
    return run_benchmark(args, language_model, policies, benchmark)


def _max_length(args: argparse.Namespace, context: int | None) -> int:
    """Longest prompt: what is asked for, else what the model holds beside an answer."""
    if args.max_length is not None:
        if context is not None and args.max_length > context:
            raise UserError(f"--max-length {args.max_length}: the model holds {context} tokens")
        return args.max_length
    return 4096 if context is None else max(context - 2 * _TEMPLATE_ROOM, context // 2)


if __name__ == "__main__":
    sys.exit(run_main(main))
