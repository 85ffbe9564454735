"""`python -m experiments.humaneval`: functions completed behind a long context."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from experiments.core.errors import UserError, run_main
from experiments.core.generated import token_counter, uncut_prompts
from experiments.core.program import (
    Benchmark,
    Generation,
    announce,
    check_length,
    load_model,
    read_policies,
    run_benchmark,
)
from experiments.core.results import asked
from experiments.core.tasks import Row
from experiments.humaneval.cli import build_parser
from experiments.humaneval.problems import build_sets, read_problems
from experiments.humaneval.scoring import (
    cut_completion,
    executed_score,
    parsed_score,
    problem_scores,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    if max(args.k) > args.samples:
        raise UserError(f"--k {max(args.k)}: expected at most --samples {args.samples}")
    if args.samples > 1 and args.temperature == 0.0:
        raise UserError(f"--samples {args.samples}: all would be the same; give --temperature")
    problems = read_problems(args.data)[: args.limit]
    language_model = load_model(args)
    check_length("--lengths", max(args.lengths), language_model)
    prompting = uncut_prompts(language_model)
    sets = build_sets(
        problems,
        lengths=args.lengths,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        count=token_counter(language_model, prompting),
    )
    run = args.allow_code_execution
    announce(
        language_model,
        sets,
        [
            "EXECUTES what the model writes, see --help"
            if run
            else "nothing is executed without --allow-code-execution"
        ],
    )
    what = "pass@k" if run else "completions that are Python"
    measures = {f" pass@{k}": k for k in args.k} if run else {"": 1}
    benchmark = Benchmark(
        name="humaneval",
        title=f"{what}, % (n counts problems)",
        sets=sets,
        averages=[],
        how=Generation(
            prompting=prompting,
            longest_prompt=max(args.lengths),
            temperature=args.temperature,
        ),
        score=executed_score if run else parsed_score,
        record=sample_row,
        regroup=lambda scores: problem_scores(scores, args.samples, measures),
        settings={"samples": args.samples, "temperature": args.temperature},
    )
    return run_benchmark(args, language_model, policies, benchmark)


def sample_row(row: Row, index: int, prediction: str) -> dict[str, Any]:
    """A line in the format that HumanEval's own scorer reads."""
    return {
        "task_id": row.row_id,
        "completion": cut_completion(prediction),
        "pred": prediction,
        "index": index,
        **asked(row),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
