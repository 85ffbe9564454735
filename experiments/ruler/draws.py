"""What every task's generator is given, and the parts of rows that several of them make."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from experiments.core.errors import UserError
from experiments.core.tasks import Row
from experiments.ruler.wordings import OWN, Wordings


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row to be made.

    Attributes:
        what: name of the set, for messages.
        rng: source of everything that is drawn.
        length: tokens of prompt and generation together, by which a task chooses its sizes.
        limit: most tokens of the prompt.
        tokens: length in tokens of the whole prompt that a row makes.
        wordings: what the prompt says.
    """

    what: str
    rng: random.Random
    length: int
    limit: int
    tokens: Callable[[Row], int]
    wordings: Wordings = OWN


def make_row(
    context: str,
    question: str,
    prefix: str,
    answers: Sequence[str],
    depths: Sequence[float] | None = None,
) -> Row:
    """A row as its generator makes it.

    Args:
        context: the long text, with whatever goes before it.
        question: the question.
        prefix: how the answer begins.
        answers: the expected answers.
        depths: where in the text they stand (see `depths_of`); None if all over it.
    """
    return Row(
        input=question,
        context=context,
        answers=tuple(answers),
        length=0,
        answer_prefix=prefix,
        others={"depths": None if depths is None else list(depths)},
    )


def depths_of(text: str, marks: Sequence[str]) -> list[float]:
    """How deep each mark stands in a text, in percent: 0 is its beginning, 100 its end.

    Args:
        text: the haystack.
        marks: parts of it; the first occurrence counts.

    Returns:
        For each mark the share of the other characters that stand before it, to one decimal.
    """
    return [round(100 * text.index(mark) / max(len(text) - len(mark), 1), 1) for mark in marks]


def join_names(names: Sequence[str], last: str = " and ") -> str:
    """Names as a sentence lists them: "a, b and c", `last` being what goes before the last one."""
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def distinct(draw: Callable[[], str], count: int, taken: set[str]) -> list[str]:
    """Draws texts that are neither taken nor alike; they are taken afterwards.

    Raises:
        UserError: there are hardly enough of them.
    """
    found: list[str] = []
    draws = 0
    while len(found) < count:
        draws += 1
        if draws > 20 * (count + 50):
            raise UserError(f"the word lists are too short for {count} different keys")
        text = draw()
        if text not in taken:
            taken.add(text)
            found.append(text)
    return found


def spread(units: Sequence[str], inserts: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Puts texts between the units of a haystack.

    Args:
        units: the haystack in reading order.
        inserts: the texts, in reading order.
        depths: for each text, ascending, the share of the units that goes before it, 0 to 1.

    Returns:
        Units and texts in reading order.
    """
    parts: list[str] = []
    done = 0
    for text, depth in zip(inserts, depths, strict=True):
        until = int(len(units) * depth)
        parts += [*units[done:until], text]
        done = until
    return [*parts, *units[done:]]
