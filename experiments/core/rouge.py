"""ROUGE F scores with the meaning of the `rouge_score` package, without stemming (Lin, 2004)."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rouge_1(prediction: str, reference: str) -> float:
    """F of the words that both texts have, each as often as both have it, 0 to 1.

    Words are runs of ASCII letters and digits in lower case.
    """
    predicted, expected = rouge_words(prediction), rouge_words(reference)
    common = collections.Counter(predicted) & collections.Counter(expected)
    return f_measure(sum(common.values()), len(predicted), len(expected))


def rouge_words(text: str) -> Sequence[str]:
    """The words that ROUGE counts."""
    return _WORD.findall(text.lower())


def f_measure(common: int, predicted: int, expected: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is common."""
    return 2 * common / (predicted + expected) if common else 0.0
