"""LongBench's metrics with the official scorer's meaning, and those of the offline suite.

Every metric maps (prediction, one answer, the row's classes) to 0..1; `score_prediction` takes
the maximum over a row's answers and returns 0..100.
"""

from __future__ import annotations

import collections
import difflib
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from experiments.core.tasks import SetSpec

Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")
_COMMENT_MARKS = ("`", "#", "//")


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, as bags, after `normalize_answer`."""
    del classes
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


@functools.cache
def _rouge() -> Any:
    # Imported here because only the summarisation sets need it.
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"], stats=["f"])


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L F of the `rouge` package, the official scorer's choice; 0 where it gives up.

    It gives up on texts without a word and, by recursion depth, on sentences of about a
    thousand words; the official scorer counts both as 0.
    """
    del classes
    try:
        return float(_rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 / (number of class names in the prediction) when the answer is among them, else 0.

    A class whose name is a part of the answer's name ("entity" in "other entity") does not count:
    it is found wherever the answer is.
    """
    found = [name for name in classes if name in prediction]
    found = [name for name in found if name == answer or name not in answer]
    return 1.0 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that equal the answer."""
    del classes
    numbers = _NUMBER.findall(prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that equal the paragraph number of the answer.

    Raises:
        ValueError: if the answer does not name a paragraph ("Paragraph 7").
    """
    named = re.search(r"Paragraph (\d+)", answer)
    if named is None:
        raise ValueError(f"the answer {answer!r} names no paragraph")
    return count(prediction, named.group(1), classes)


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first predicted line that is not a comment, in hundredths.

    The rule of the official scorer: leading newlines go, then the first line without a backquote,
    `#` or `//` is compared; without such a line the empty one is. The similarity is that of
    `fuzz.ratio` on the plain `difflib` matcher, rounded to hundredths (the faster library that it
    takes when installed gives other numbers; the official requirements do not install it).
    """
    del classes
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(m in line for m in _COMMENT_MARKS)), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def words_in_order(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the answer's words that the prediction holds in the same order.

    Words are runs of letters and digits in lower case; the share is the longest common
    subsequence over the number of the answer's words, so words around the answer cost nothing.
    """
    del classes
    expected = _WORD.findall(answer.lower())
    best = [0] * (len(expected) + 1)
    for word in _WORD.findall(prediction.lower()):
        previous = best[:]
        for i, wanted in enumerate(expected):
            best[i + 1] = previous[i] + 1 if word == wanted else max(previous[i + 1], best[i])
    return best[-1] / len(expected) if expected else 0.0


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "code_similarity": code_similarity,
    "words_in_order": words_in_order,
}


def score_prediction(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """Scores one prediction.

    Args:
        spec: the set; says which metric, and whether only the first line counts.
        prediction: what the model wrote.
        answers: the accepted answers.
        classes: the row's `all_classes`.

    Returns:
        The best score over the answers, 0 to 100.
    """
    if spec.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[spec.metric]
    return 100 * max((metric(prediction, answer, classes or ()) for answer in answers), default=0.0)
