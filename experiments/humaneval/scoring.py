"""Completions to programs, and pass@k (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping, Sequence

from experiments.core.tasks import SetSpec
from experiments.core.uncertainty import Scores
from experiments.humaneval.sandbox import run_program

# A line at the left edge that begins something else than the function's body.
_END = re.compile(r"\n(?=def |class |if |print|#|@|import |from |assert |```)")


def cut_completion(prediction: str) -> str:
    """The body of the function: what comes before the next statement at the left edge."""
    return _END.split(prediction, maxsplit=1)[0]


def program_of(prediction: str, answers: Sequence[str]) -> str:
    """The problem, its completion and its tests as one program.

    Args:
        prediction: what the model wrote.
        answers: the problem's beginning, its tests, and the name of its function.
    """
    prompt, test, entry_point = answers
    return f"{prompt}{cut_completion(prediction)}\n\n{test}\n\ncheck({entry_point})\n"


def executed_score(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """100 if the program passes its tests. RUNS what the model wrote."""
    del spec, classes
    return 100.0 * (run_program(program_of(prediction, answers)) == "passed")


def parsed_score(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """100 if the program is Python at all; runs nothing."""
    del spec, classes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(program_of(prediction, answers))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return 100.0


def problem_scores(
    scores: Scores, samples: int, measures: Mapping[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Scores of problems from those of their samples, which are not independent of each other.

    Args:
        scores: 0 or 100 for each sample, a problem's standing together.
        samples: of each problem.
        measures: what stands behind a set's name -> k.

    Returns:
        policy -> set and measure -> pass@k of each problem, 0 to 100.
    """
    return {
        policy: {
            name + measure: [
                100 * pass_at_k(samples, sum(value > 0 for value in values[i : i + samples]), k)
                for i in range(0, len(values), samples)
            ]
            for name, values in sets.items()
            for measure, k in measures.items()
        }
        for policy, sets in scores.items()
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples passes: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, samples of a problem.
        passed: c, those that pass.
        k: at most n.

    Raises:
        ValueError: `k` or `passed` is not within the samples.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"k: expected 1 to {samples} of {samples} samples, got {k}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
