"""Needles in a haystack: eight tasks that differ in needles, haystack and what is asked."""

from __future__ import annotations

import dataclasses
import functools
import random
import uuid
from collections.abc import Callable
from typing import Literal

from experiments.core.fitting import fit_units
from experiments.core.tasks import Row
from experiments.ruler.draws import Draw, depths_of, distinct, join_names, make_row, spread
from experiments.ruler.sources import Sources
from experiments.ruler.wordings import Asking, Wordings

Kind = Literal["word", "number", "uuid"]

# The depths, in percent of the sentences, at which needles stand in essays: 40 equal steps.
_DEPTHS = [round(100 * step / 39) for step in range(40)]
# A distractor of the needle haystack has this many tokens at the very least.
_LEAST_TOKENS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """One of the eight tasks, as RULER's `synthetic.yaml` sets it up.

    Attributes:
        haystack: "noise" repeats a few sentences, "essay" is prose, "needle" is other needles.
        key: what a needle is asked by.
        value: what is asked for.
        keys: needles with different keys.
        values: needles of each key.
        queries: keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def plural(self) -> bool:
        """Whether several values are asked for."""
        return self.values * self.queries > 1

    def asking(self, wordings: Wordings) -> Asking:
        """How they are asked for."""
        return wordings.niah.asking(self.value, plural=self.plural)


NIAH: dict[str, Needles] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", value="uuid"),
    "niah_multikey_1": Needles(haystack="essay", keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key="uuid", value="uuid"),
    "niah_multivalue": Needles(haystack="essay", values=4),
    "niah_multiquery": Needles(haystack="essay", keys=4, queries=4),
}


def make_niah(needles: Needles, sources: Sources, draw: Draw) -> Row:
    """Draws needles and hides them in as much haystack as fits.

    The essays begin at a sentence of their own for each row. What is left of the length after the
    last whole sentence, or line, is filled with the end of the one before the first.

    Raises:
        UserError: a text is missing, or the length is too small.
    """
    rng = draw.rng
    wording = draw.wordings.niah
    needle = functools.partial(wording.needle.format, kind=needles.value)
    taken: set[str] = set()
    draw_key = _drawer(needles.key, sources, rng)
    draw_value = _drawer(needles.value, sources, rng)
    keys = distinct(draw_key, needles.keys, taken)
    values = {key: distinct(draw_value, needles.values, taken) for key in keys}
    asked = rng.sample(keys, needles.queries)
    hidden = [needle(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    if needles.haystack == "essay":
        start = rng.randrange(len(sources.essays))
        pool = [*sources.essays[start:], *sources.essays[:start]]
        depths = [depth / 100 for depth in sorted(rng.sample(_DEPTHS, len(hidden)))]
        separator = " "
    else:
        depths = sorted(rng.random() for _ in hidden)
        separator = "\n"
        if needles.haystack == "noise":
            pool = [wording.noise]
        else:
            count = draw.limit // _LEAST_TOKENS + 2
            others = zip(
                distinct(draw_key, count, taken), distinct(draw_value, count, taken), strict=True
            )
            pool = [needle(key=key, value=value) for key, value in others]

    answers = [value for key in asked for value in values[key]]
    marks = [needle(key=key, value=value) for key in asked for value in values[key]]
    names = join_names(asked, wording.last)
    asking = needles.asking(draw.wordings)
    question, prefix = (text.format(query=names) for text in (asking.question, asking.prefix))

    def build(fragment: str, units: list[str]) -> Row:
        haystack = [fragment, *units] if fragment else units
        context = separator.join(spread(haystack, hidden, depths))
        return make_row(context, question, prefix, answers, depths_of(context, marks))

    fragment, units = fit_units(
        pool,
        lambda *parts: draw.tokens(build(*parts)),
        draw.limit,
        least=1,
        what=draw.what,
        separator=separator,
    )
    return build(fragment, units)


def _drawer(kind: Kind, sources: Sources, rng: random.Random) -> Callable[[], str]:
    if kind == "number":
        return lambda: str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = sources.words
    return lambda: f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"
