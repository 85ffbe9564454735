"""InfiniteBench's metrics, with the official scorer's meaning; where that would crash, 0.

Every metric maps (prediction, the row's answers) to 0..1.
"""

from __future__ import annotations

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from experiments.core.errors import UserError
from experiments.core.rouge import f_measure
from experiments.core.tasks import SetSpec
from experiments.infinitebench.tasks import TASKS
from experiments.longbench.metrics import qa_f1

Metric = Callable[[str, Sequence[str]], float]

_NUMBER = re.compile(r"[0-9]+\.[0-9]+|[0-9]+")
_INTEGER = re.compile(r"[0-9]+")
_MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_CHOICE_MARKS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_RUN_MARKS = str.maketrans(dict.fromkeys("\n.`'\":", " "))
_DEBUG_MARKS = re.compile(r"[\n`'\"*-]|[Oo]ption")
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_PREFIXES = ("answer is:", "is:", "answer:")


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first run of digits is the answer, digit by digit."""
    found = _INTEGER.search(prediction)
    return float(found is not None and found[0] == answers[0])


def contains_word(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer is among the words that punctuation separates."""
    return float(answers[0] in prediction.translate(_MARKS).split())


def contains_name(prediction: str, answers: Sequence[str]) -> float:
    """As `contains_word`, the prediction in upper case."""
    return contains_word(prediction.upper(), answers)


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first number, with or without decimals, equals the answer."""
    found = _NUMBER.search(prediction)
    return float(found is not None and float(found[0]) == float(answers[0]))


def running_results(prediction: str, answers: Sequence[str]) -> float:
    """Share of the results that are right before the first wrong one."""
    right = 0
    for found, wanted in zip(_INTEGER.findall(prediction), answers, strict=False):
        if int(found) != int(wanted):
            break
        right += 1
    return right / len(answers)


def last_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last word is a whole number and equals the answer."""
    words = prediction.translate(_RUN_MARKS).split()
    try:
        return float(bool(words) and int(words[-1]) == int(answers[0]))
    except ValueError:
        return 0.0


def debug_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 for the right letter, first of all or behind a phrase, or there for the function's name.

    `answers` holds the function's name and the letter.
    """
    name, letter = answers[0], answers[1]
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(" +", " ", _DEBUG_MARKS.sub(" ", prediction.strip()))
    after = _behind(text, _DEBUG_PREFIXES)
    return float(after is not None and after.startswith((letter, name)))


def letter_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 for the right letter: the first character, else behind a phrase, else the first alone."""
    if prediction[:1] and prediction[0] in "ABCD":
        return float(prediction[0] in answers)
    text = re.sub(" +", " ", prediction.translate(_CHOICE_MARKS))
    after = _behind(text, _CHOICE_PREFIXES)
    if after is not None:
        return float(after.startswith(tuple(answers)))
    letter = next((word for word in text.split() if word in ("A", "B", "C", "D")), None)
    return float(letter in answers)


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's F1 of words, the best one over the answers."""
    return max(qa_f1(prediction, answer) for answer in answers)


def character_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of characters, punctuation and white space aside, the best one over the answers."""
    predicted = _characters(prediction)

    def f1(answer: str) -> float:
        expected = _characters(answer)
        common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
        return f_measure(common, len(predicted), len(expected))

    return max(f1(answer) for answer in answers)


def summary_rouge(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum F of the package `rouge_score`, without stemming, as the official scorer has it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError('summaries need rouge_score: pip install "restkv-jax[eval]"') from None
    return float(RougeScorer(["rougeLsum"]).score(answers[0], prediction)["rougeLsum"].fmeasure)


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        first_integer,
        contains_word,
        contains_name,
        first_number,
        running_results,
        last_integer,
        debug_choice,
        letter_choice,
        word_f1,
        character_f1,
        summary_rouge,
    )
}


def score_prediction(
    spec: SetSpec, prediction: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """Scores one prediction, 0 to 100; see `experiments.core.runner.Score`."""
    del classes
    text = prediction.strip()
    if METRICS[spec.metric] is debug_choice:
        # A letter or a name alone counts behind a phrase only, with which our prompt ends.
        text = f"{TASKS['code_debug'].prefix} {text}"
    return 100 * METRICS[spec.metric](text, answers)


def _behind(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the phrases that occurs, and one more character; None without."""
    for prefix in prefixes:
        start = text.find(prefix)
        if start >= 0:
            return text[start + len(prefix) + 1 :]
    return None


def _characters(text: str) -> list[str]:
    return [
        c
        for c in "".join(text.lower().split())
        # Marks that are symbols to Unicode, such as "+", count too, in both widths.
        if unicodedata.normalize("NFKC", c) not in string.punctuation
        and not unicodedata.category(c).startswith("P")
    ]
