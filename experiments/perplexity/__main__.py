"""`python -m experiments.perplexity`: how well long texts are predicted from evicted caches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from experiments.core.errors import UserError, run_main
from experiments.core.plans import describe_plan
from experiments.core.plots import require_matplotlib
from experiments.core.program import (
    Benchmark,
    announce,
    check_length,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.tasks import Row
from experiments.core.texts import Text, read_texts
from experiments.longbench.stdlib_text import prose_sentences
from experiments.perplexity.cli import build_parser
from experiments.perplexity.documents import build_sets, cut_documents
from experiments.perplexity.measure import Likelihoods, make_plans, mean_nll
from experiments.perplexity.report import write_report

# Policies; each has a program of its own while decoding, see `let_programs_go`.
_MOST_TOGETHER = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    prompt = _prompt(args)
    follow = {"decode": args.length - 1, "prefill": args.length - prompt}
    plans = {
        mode: make_plans(
            policies, args.budget, mode=mode, follow=follow[mode], evict_every=args.evict_every
        )
        for mode in args.modes
    }
    if not args.no_plots:
        require_matplotlib()
    if args.data == "offline":
        texts: Sequence[Text] = (Text("prose of Python's reference", " ".join(prose_sentences())),)
    else:
        texts = read_texts(args.data)
    language_model = load_model(args)
    check_length("--length", args.length, language_model)
    documents = cut_documents(
        texts,
        language_model.tokenizer,
        length=args.length,
        rows=min(args.rows, args.limit or args.rows),
    )
    source = "offline" if args.data == "offline" else ", ".join(dict.fromkeys(map(_file, texts)))
    sets = build_sets(documents, args.modes, length=args.length, prompt=prompt, source=source)
    announce(language_model, sets, [f"{args.length} tokens each, of: {source}"])
    benchmark = Benchmark(
        name="perplexity",
        title="negative log-likelihood of a text, nats a token (lower is better)",
        sets=sets,
        averages=[],
        how=lambda: Likelihoods(language_model, plans, prompt=prompt),
        score=mean_nll,
        digits=4,
        record=likelihood_row,
        finish=lambda store, scores: write_report(
            store,
            scores,
            sets,
            length=args.length,
            bins=args.bins,
            plots=not args.no_plots,
        ),
        most_together=_MOST_TOGETHER,
        settings={
            "prompt": prompt,
            "plans": {
                mode: {label: describe_plan(plan) for label, plan in own.items()}
                for mode, own in plans.items()
            },
        },
    )
    return run_benchmark(args, language_model, policies, benchmark)


def likelihood_row(row: Row, index: int, prediction: Any) -> dict[str, Any]:
    """A line of a prediction file: the negative log-likelihood of each token that was scored."""
    return {"index": index, "_id": row.row_id, "length": row.length, "pred": prediction}


def _prompt(args: argparse.Namespace) -> int:
    prompt = args.length // 2 if args.prompt is None else args.prompt
    if prompt >= args.length:
        raise UserError(f"--prompt {prompt}: expected less than --length {args.length}")
    return prompt


def _file(text: Text) -> str:
    return text.name.partition(":")[0]


if __name__ == "__main__":
    sys.exit(run_main(main))
