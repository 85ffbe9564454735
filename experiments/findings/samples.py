"""Prompts of an exact length with an answer that a full cache should know."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

from experiments.longbench.offline_tasks import MAKERS
from experiments.longbench.stdlib_text import prose_sentences

Encode = Callable[[str], list[int]]

# Sentences at the start of the prose that calibration reads; no sample is made of them.
CALIBRATION_SENTENCES = 400

_NAMES = [
    "Margaret",
    "Oscar",
    "Priya",
    "Kenji",
    "Fatima",
    "Ludwig",
    "Chiara",
    "Tobias",
    "Ingrid",
    "Mateo",
    "Harold",
    "Noemi",
]
_COLOURS = [
    "amber",
    "crimson",
    "silver",
    "golden",
    "bright",
    "purple",
    "copper",
    "velvet",
    "wooden",
    "frozen",
]
_PLACES = [
    "harbor",
    "lantern",
    "meadow",
    "canyon",
    "orchard",
    "castle",
    "garden",
    "tunnel",
    "river",
    "basket",
]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt in tokens.

    Attributes:
        task: which of `TASKS`.
        seed: number of the sample within its task and length.
        context: what is compressed if the question is not to be known.
        question: what follows; empty for a plain continuation.
        answer: the right answer.
        counted: for each token of the answer whether it is the answer's own, not a phrase's.
    """

    task: str
    seed: int
    context: list[int]
    question: list[int]
    answer: list[int]
    counted: list[bool]


def make_sample(
    task: str, seed: int, length: int, encode: Encode, start: Sequence[int], *, inside: bool = False
) -> Sample:
    """Draws a sample whose context has exactly `length` tokens, or context and question together.

    Args:
        task: one of `TASKS`.
        seed: of everything that is drawn.
        length: tokens.
        encode: text -> tokens, without special ones.
        start: special tokens that the context begins with.
        inside: `length` counts the question.
    """

    def draw(room: int) -> Sample:
        rng = random.Random(f"findings-{task}-{length}-{seed}")
        return TASKS[task](rng, seed, room, encode, list(start))

    sample = draw(length)
    return draw(length - len(sample.question)) if inside else sample


def prose(rng: random.Random) -> list[str]:
    """Sentences in reading order from a random place on, those for calibration left out."""
    sentences = prose_sentences()[CALIBRATION_SENTENCES:]
    place = rng.randrange(len(sentences))
    return [*sentences[place:], *sentences[:place]]


def calibration_text(length: int, encode: Encode, start: Sequence[int], skip: int = 0) -> list[int]:
    """Plain prose of exactly `length` tokens that no sample contains."""
    ids = encode(" ".join(prose_sentences()[skip:CALIBRATION_SENTENCES]))
    return [*start, *ids][:length]


def _fitted(units: Sequence[list[int]], room: int) -> list[list[int]]:
    """As many first units as fill `room` tokens, cut at their start to fit."""
    taken: list[list[int]] = []
    total = 0
    for unit in units:
        if total >= room:
            break
        taken.append(unit)
        total += len(unit)
    surplus = total - room
    while surplus > 0:
        cut = min(surplus, len(taken[0]))
        taken[0], surplus = taken[0][cut:], surplus - cut
        taken = taken if taken[0] else taken[1:]
    return taken


def _hidden(
    rng: random.Random,
    length: int,
    encode: Encode,
    start: list[int],
    head: str,
    needles: Sequence[str],
) -> list[int]:
    """Prose with passages at random places, exactly `length` tokens."""
    parts = [encode("\n" + needle + "\n") for needle in needles]
    opening = start + encode(head)
    room = length - len(opening) - sum(map(len, parts))
    filler = _fitted([encode(" " + sentence) for sentence in prose(rng)[: length // 5]], room)
    places = sorted((rng.randrange(1, len(filler)) for _ in parts), reverse=True)
    for place, part in zip(places, parts, strict=True):
        filler.insert(place, part)
    return opening + list(itertools.chain(*filler))


def _answer(encode: Encode, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    counted: list[bool] = []
    for text, own in pieces:
        tokens = encode(text)
        ids += tokens
        counted += [own] * len(tokens)
    return ids, counted


def _sentence(
    rng: random.Random, seed: int, length: int, encode: Encode, start: list[int]
) -> Sample:
    """Four codes, each in one sentence; one of them is asked."""
    names = rng.sample(_NAMES, 4)
    codes = [
        f"{rng.choice(_COLOURS)} {rng.choice(_PLACES)} {rng.randrange(100_000, 1_000_000)}"
        for _ in names
    ]
    needles = [f"The secret code of {n} is {c}." for n, c in zip(names, codes, strict=True)]
    asked = rng.randrange(4)
    head = "Remember the secret codes that are hidden in this text.\n\n"
    context = _hidden(rng, length, encode, start, head, needles)
    question = f"\n\nHere is one of the secret codes again.\n\nThe secret code of {names[asked]} is"
    answer = _answer(encode, [(" " + codes[asked], True)])
    return Sample("sentence", seed, context, encode(question), *answer)


def _record(rng: random.Random, seed: int, length: int, encode: Encode, start: list[int]) -> Sample:
    """Two records of four sentences, of which only the first names the person."""
    names = rng.sample(_NAMES, 2)
    colours, places = rng.sample(_COLOURS, 2), rng.sample(_PLACES, 2)
    numbers = [str(rng.randrange(1_000, 10_000)) for _ in names]
    records = [
        f"Here begins the record of {name}. It was written by hand and read twice by the clerk. "
        f"The colour of the seal is {colour}. The paper is kept near the {place}. "
        f"The number on its back is {number}."
        for name, colour, place, number in zip(names, colours, places, numbers, strict=True)
    ]
    i = rng.randrange(2)
    head = "Remember the records that are hidden in this text.\n\n"
    context = _hidden(rng, length, encode, start, head, records)
    question = (
        f"\n\nHere is one of the records again.\n\nHere begins the record of {names[i]}. It was "
        "written by hand and read twice by the clerk. The colour of the seal is"
    )
    answer = _answer(
        encode,
        [
            (" " + colours[i], True),
            (". The paper is kept near the", False),
            (" " + places[i], True),
            (". The number on its back is", False),
            (" " + numbers[i], True),
        ],
    )
    return Sample("record", seed, context, encode(question), *answer)


def _few_shot(
    rng: random.Random, seed: int, length: int, encode: Encode, start: list[int]
) -> Sample:
    """Lines of code with labels; the label of a new line is asked."""
    task = MAKERS["few_shot"](rng, str(seed), length, lambda text: len(encode(text)))
    row = task.make_row("", [])
    opening = start + encode("Say what each line of Python code is.")
    units = [encode("\n\n" + unit) for unit in list(task.pool)[: length // 10]]
    context = opening + list(itertools.chain(*_fitted(units, length - len(opening))))
    answer = _answer(encode, [(" " + row.answers[0], True)])
    return Sample("few_shot", seed, context, encode("\n\n" + row.input), *answer)


def _continuation(
    rng: random.Random, seed: int, length: int, encode: Encode, start: list[int]
) -> Sample:
    """Prose and the 32 tokens that follow; only its divergence means anything."""
    ids = start + encode(" ".join(prose(rng)[: length // 4]))
    answer = ids[length + 1 : length + 33]
    # One token as the question: its logits come from what was kept.
    return Sample(
        "continuation", seed, ids[:length], ids[length : length + 1], answer, [True] * len(answer)
    )


TASKS: dict[str, Callable[[random.Random, int, int, Encode, list[int]], Sample]] = {
    "sentence": _sentence,
    "record": _record,
    "few_shot": _few_shot,
    "continuation": _continuation,
}
