"""RULER's scores, with the official scorer's meaning (Hsieh et al., arXiv 2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from experiments.core.tasks import SetSpec

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, upper and lower case being the same."""
    return sum(_occurs(answer, prediction) for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the answers occurs in the prediction, upper and lower case being the same.

    lm-evaluation-harness 0.4.13 divides this by the number of answers; the official scorer does
    not.
    """
    return float(any(_occurs(answer, prediction) for answer in answers))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


def score_prediction(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """Scores one prediction.

    Args:
        spec: the set; says which metric.
        prediction: what the model wrote.
        answers: what it should have written.
        classes: of no meaning here.

    Returns:
        0 to 100.
    """
    del classes
    return 100 * METRICS[spec.metric](_CONTROL.sub("\n", prediction.strip()).strip(), answers)


def _occurs(answer: str, prediction: str) -> bool:
    return answer.lower() in prediction.lower()
