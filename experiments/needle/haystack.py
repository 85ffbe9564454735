"""The needles, and the rows: a needle at a depth of as much haystack as fits a length."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

from experiments.core.fitting import fit_units
from experiments.core.tasks import CountTokens, Measure, Row, SetSpec, TaskSet
from experiments.ruler.draws import depths_of

PROMPT = (
    "One sentence of the text below has nothing to do with the rest of it. Remember it, you will "
    "be asked.\n\n{context}\n\n{input}"
)
MAX_NEW_TOKENS = 32

_TOWNS = [
    "Ardmere",
    "Belcroft",
    "Corvale",
    "Dunmarsh",
    "Eastholm",
    "Fenwick",
    "Galden",
    "Harrowby",
    "Ilmar",
    "Kestrel",
]
_BUILDINGS = [
    "lighthouse",
    "library",
    "bakery",
    "mill",
    "chapel",
    "theatre",
    "museum",
    "harbour",
    "office",
]
_COLOURS = ["yellow", "purple", "silver", "crimson", "orange", "turquoise", "white", "brown"]
_THINGS = ["bucket", "barrel", "blanket", "ladder", "wheelbarrow", "basket", "drum", "umbrella"]
_PLACES = ["stone bridge", "old fountain", "railway station", "walnut tree", "fish market"]
_NAMES = [
    "Agnes",
    "Bruno",
    "Celia",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Imani",
    "Joaquin",
]
_JOBS = ["plumber", "violinist", "librarian", "gardener", "baker", "surgeon", "pilot", "tailor"]


@dataclasses.dataclass(frozen=True)
class Needle:
    """What is hidden, and how it is asked for.

    Attributes:
        sentence: what stands in the haystack.
        question: the question.
        prefix: how the answer begins, prepositions included: "beneath" for "under" is no error.
        answer: what follows; several words, because the first token of an answer comes from the
            full prefill, whatever the policy, when the question is part of the prompt.
    """

    sentence: str
    question: str
    prefix: str
    answer: str


def draw_needle(rng: random.Random) -> Needle:
    """Draws a needle."""
    town, building, name = rng.choice(_TOWNS), rng.choice(_BUILDINGS), rng.choice(_NAMES)
    colours = rng.sample(_COLOURS, 2)
    thing, job, place = rng.choice(_THINGS), rng.choice(_JOBS), rng.choice(_PLACES)
    count = rng.randrange(12, 99)
    said, question, answer = rng.choice(
        [
            (
                f"The key to the {building} of {town} is hidden under",
                f"Where is the key to the {building} of {town} hidden?",
                f"the {colours[0]} {thing} next to the {place}",
            ),
            (
                f"{name} the {job} came to {town} to buy",
                f"What did {name} the {job} come to {town} to buy?",
                f"{count} {colours[0]} {thing}s and a {colours[1]} hat",
            ),
            (
                f"The secret meeting of the {job}s of {town} takes place behind",
                f"Where does the secret meeting of the {job}s of {town} take place?",
                f"the {building} with the {colours[0]} door near the {place}",
            ),
        ]
    )
    return Needle(f"{said} {answer}.", question, said, answer)


def build_sets(
    sentences: Sequence[str], measure: Measure, *, depths: Sequence[float], source: str
) -> list[TaskSet]:
    """Makes a set for each length; its rows are the cells of that length, depth by depth.

    Trial i has the same needle, and a haystack that begins at the same sentence, in every cell: the
    cells differ in nothing but length and depth.

    Args:
        sentences: the haystack in reading order; it starts over where it is too short.
        measure: what the sets are made to; its `rows` are the trials in each cell.
        depths: in percent of the haystack.
        source: where the haystack comes from, in words.

    Raises:
        UserError: a length is too small.
    """
    sets = []
    for length in measure.lengths:
        spec = SetSpec(
            name=str(length),
            prompt=PROMPT,
            max_new_tokens=MAX_NEW_TOKENS,
            metric="needle",
            chat=measure.chat,
        )
        cells = tuple(
            make_row(sentences, spec, length, depth, trial, seed=measure.seed, count=measure.count)
            for depth in depths
            for trial in range(measure.rows)
        )
        sets.append(TaskSet(spec=spec, rows=cells, source=f"{source}, {length} tokens"))
    return sets


def make_row(
    sentences: Sequence[str],
    spec: SetSpec,
    length: int,
    depth: float,
    trial: int,
    *,
    seed: int,
    count: CountTokens,
) -> Row:
    """Makes one cell's row, see `build_sets`.

    The needle stands between two sentences, where the share of the haystack's characters before it
    is closest to the depth. What is left of the length after the last whole sentence is filled with
    the end of the one before the first.
    """
    rng = random.Random(f"needle-{seed}-{trial}")
    needle = draw_needle(rng)
    start = rng.randrange(len(sentences))
    pool = [*sentences[start:], *sentences[:start]]
    limit = length - spec.max_new_tokens

    def build(fragment: str, units: Sequence[str]) -> Row:
        hay = [" ".join(fragment.split("\n")), *units] if fragment else [*units]
        cut = cut_at(hay, depth / 100)
        context = " ".join([*hay[:cut], needle.sentence, *hay[cut:]])
        return Row(
            input=needle.question,
            context=context,
            answers=(needle.answer,),
            length=length,
            row_id=f"{length}-{depth:g}-{seed}-{trial}",
            answer_prefix=needle.prefix,
            others={"depth": depth, "trial": trial, "at": depths_of(context, [needle.sentence])[0]},
        )

    parts = fit_units(
        pool, lambda *parts: count(spec, build(*parts)), limit, least=1, what=f"{length}"
    )
    row = build(*parts)
    return dataclasses.replace(row, length=count(spec, row) + spec.max_new_tokens)


def cut_at(units: Sequence[str], share: float) -> int:
    """How many first units hold the given share of all characters, as closely as can be."""
    before = [0, *itertools.accumulate(len(unit) for unit in units)]
    return min(range(len(before)), key=lambda i: abs(before[i] - share * before[-1]))
