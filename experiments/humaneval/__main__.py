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
from experiments.core.table import TextTable
from experiments.core.tasks import Row, TaskSet
from experiments.core.uncertainty import Scores
from experiments.humaneval.cli import build_parser
from experiments.humaneval.problems import build_sets, read_problems
from experiments.humaneval.scoring import (
    cut_completion,
    executed_score,
    parsed_score,
    pass_at_k,
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
    benchmark = Benchmark(
        name="humaneval",
        title="completions that pass their tests, %" if run else "completions that are Python, %",
        sets=sets,
        averages=[],
        how=Generation(
            prompting=prompting,
            longest_prompt=max(args.lengths),
            temperature=args.temperature,
        ),
        score=executed_score if run else parsed_score,
        record=sample_row,
        finish=lambda _, scores: [pass_table(scores, sets, args.samples, args.k)] if run else [],
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


def pass_table(
    scores: Scores, sets: Sequence[TaskSet], samples: int, ks: Sequence[int]
) -> TextTable:
    """pass@k of each length and policy: the mean over the problems.

    Args:
        scores: of each row, a problem's samples standing together.
        sets: one for each length.
        samples: of each problem.
        ks: which k.
    """
    rows = []
    for task in sets:
        name = task.spec.name
        for k in ks:
            cells = []
            for policy in scores:
                values = scores[policy][name]
                groups = [values[i : i + samples] for i in range(0, len(values), samples)]
                passed = [pass_at_k(samples, sum(v > 0 for v in group), k) for group in groups]
                cells.append(f"{100 * sum(passed) / len(passed):.2f}")
            rows.append((f"{name} pass@{k}", *cells))
    return TextTable("pass@k, %", ("length", *scores), tuple(rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
