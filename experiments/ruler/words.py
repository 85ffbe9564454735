"""Aggregation: the most common words of a list (cwe), and of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from experiments.core.errors import UserError
from experiments.core.fitting import largest_fit
from experiments.core.tasks import Row
from experiments.ruler.draws import Draw, distinct, make_row
from experiments.ruler.sources import Sources
from experiments.ruler.wordings import Asking, ListWording

_COMMON = 10

_NOISE = "..."
_ALPHA = 2
_CODE_LETTERS = 6
_FREQUENT = 3


def make_common(sources: Sources, draw: Draw) -> Row:
    """A shuffled list in which ten words come more often than all others.

    From 4,096 tokens on, 30 times against 3, after a worked example of 40 words (10 times against
    3); from 1,024 on, 6 times against once, after 20 words (3 times against once): the official
    set-up. Below, where that example would leave no room for the list, 4 times against once and
    no example. The last of the other words may come less often, to fill the length.

    Raises:
        UserError: the words are missing or too few, or the length is too small.
    """
    rng, wording = draw.rng, draw.wordings.cwe
    if draw.length >= 4096:
        times, others_times = 30, 3
        example = _example(sources.words.all, rng, wording, 40, 10, 3)
    elif draw.length >= 1024:
        times, others_times = 6, 1
        example = _example(sources.words.all, rng, wording, 20, 3, 1)
    else:
        times, others_times, example = 4, 1, ""
    words = list(sources.words.all)
    rng.shuffle(words)
    common, others = words[:_COMMON], words[_COMMON:]
    order = rng.getrandbits(64)
    question, prefix = _ask(wording.asking, _COMMON)

    def build(count: int, more: Sequence[str] = ()) -> Row:
        listed = common * times + [others[i // others_times] for i in range(count)]
        random.Random(order).shuffle(listed)
        context = f"{example}{wording.asking.intro}{_numbered([*listed, *more], wording.item)}"
        return make_row(context, question, prefix, common)

    def fit() -> int | None:
        most = len(others) * others_times
        count = largest_fit(
            lambda count: draw.tokens(build(count)), draw.limit, least=_COMMON, most=most
        )
        return -1 if count == most else count

    count = fit()
    if count == -1:  # the whole list is shorter than asked
        spare = list(sources.spare_words)
        rng.shuffle(spare)
        others += spare
        count = fit()
    if count is None:
        raise UserError(f"set {draw.what}: {draw.limit} tokens are too few for it")
    if count == -1:
        raise UserError(
            f"set {draw.what}: {len(common) + len(others)} words are too few for {draw.limit} "
            "tokens; give a folder with words_alpha.txt (--data DIR)"
        )
    # One more word a time, short ones: what is left is less than one of them.
    more: list[str] = []
    for word in sorted(others[count // others_times + 1 :], key=lambda w: (len(w), w))[:4]:
        if draw.tokens(build(count, [*more, word])) > draw.limit:
            break
        more.append(word)
    return build(count, more)


def _example(
    words: Sequence[str],
    rng: random.Random,
    wording: ListWording,
    total: int,
    times: int,
    others: int,
) -> str:
    drawn = rng.sample(words, total)
    common = drawn[:_COMMON]
    listed = common * times + drawn[_COMMON:] * others
    rng.shuffle(listed)
    text, answer = _numbered(listed, wording.item), _numbered(common, wording.item)
    return wording.asking.show(text, answer, count=_COMMON)


def _numbered(words: Sequence[str], item: str) -> str:
    return " ".join(item.format(i, word) for i, word in enumerate(words, start=1))


def _ask(asking: Asking, count: int) -> tuple[str, str]:
    return asking.question.format(count=count), asking.prefix.format(count=count)


def make_frequent(draw: Draw) -> Row:
    """A text of made-up words whose frequencies follow a zeta distribution with exponent 2.

    The most frequent "word" is dots; the three that follow are asked for, and the third of them
    comes more often than the next. Dots at the end fill the length.

    Raises:
        UserError: the length is too small.
    """
    rng = draw.rng
    vocabulary = distinct(
        lambda: "".join(rng.choices(string.ascii_lowercase, k=_CODE_LETTERS)),
        max(draw.length // 50, _FREQUENT + 2),
        set(),
    )
    order = rng.getrandbits(64)
    question, prefix = _ask(draw.wordings.fwe, _FREQUENT)

    def counts(total: int) -> list[int]:
        # Rank 1 is the noise; zeta(2) = pi^2 / 6.
        share = total / (math.pi**2 / 6)
        return [int(share / rank**_ALPHA) for rank in range(1, len(vocabulary) + 2)]

    def build(total: int, dots: int = 0) -> Row:
        times = counts(total)
        text = [_NOISE] * times[0]
        for word, number in zip(vocabulary, times[1:], strict=True):
            text += [word] * number
        random.Random(order).shuffle(text)
        context = " ".join([*text, *[_NOISE] * dots])
        return make_row(context, question, prefix, vocabulary[:_FREQUENT])

    total = largest_fit(lambda total: draw.tokens(build(total)), draw.limit)
    # The ranks must be told apart, which rounding prevents for some totals.
    while total and counts(total)[_FREQUENT] == counts(total)[_FREQUENT + 1]:
        total -= 1
    if not total:
        raise UserError(f"set {draw.what}: {draw.limit} tokens are too few for it")
    dots = largest_fit(lambda dots: draw.tokens(build(total, dots)), draw.limit)
    return build(total, dots or 0)
