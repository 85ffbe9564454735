"""Variable tracking: a chain of assignments in noise, all of whose variables hold one value."""

from __future__ import annotations

import itertools
import random
import string

from experiments.core.fitting import fit_units
from experiments.core.tasks import Row
from experiments.ruler.draws import Draw, depths_of, distinct, make_row, spread
from experiments.ruler.wordings import TrackingWording

_HOPS = 4
# Sentences of noise in the worked example: that of the official set-up has 500 tokens in all.
_EXAMPLE_NOISE = 60
# Sentences in a round of noise, whatever the units that it is made of.
_NOISE_SENTENCES = 5


def make_tracking(draw: Draw) -> Row:
    """Draws a chain of four hops and hides it in as much noise as fits, after a worked example.

    The example has names of three letters instead of five, and about an eighth of a prompt below
    4,096 tokens.

    Raises:
        UserError: the length is too small.
    """
    rng, wording = draw.rng, draw.wordings.vt
    value, other = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    names, chain = _draw_chain(rng, wording, value, 5)
    depths = sorted(rng.random() for _ in chain)
    example = _example(rng, wording, other, min(_EXAMPLE_NOISE, draw.length // 64))
    question, prefix = (
        text.format(query=value, count=len(names))
        for text in (wording.asking.question, wording.asking.prefix)
    )

    def build(fragment: str, units: list[str]) -> Row:
        start = fragment.lstrip()
        haystack = [start, *units] if start else units
        text = " ".join(spread(haystack, chain, depths))
        context = f"{example}{wording.asking.intro}{text}"
        return make_row(context, question, prefix, names, depths_of(text, chain))

    fragment, units = fit_units(
        wording.noise,
        lambda *parts: draw.tokens(build(*parts)),
        draw.limit,
        least=len(chain),
        what=draw.what,
        separator=" ",
    )
    return build(fragment, units)


def _draw_chain(
    rng: random.Random, wording: TrackingWording, value: str, letters: int
) -> tuple[list[str], list[str]]:
    """Names, and the assignments in their order."""
    names = distinct(
        lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), _HOPS + 1, set()
    )
    chain = [wording.first.format(names[0], value)]
    chain += [wording.then.format(b, a) for a, b in itertools.pairwise(names)]
    return names, chain


def _example(rng: random.Random, wording: TrackingWording, value: str, sentences: int) -> str:
    names, chain = _draw_chain(rng, wording, value, 3)
    pool = wording.noise
    count = sentences * len(pool) // _NOISE_SENTENCES
    units = [pool[i % len(pool)] for i in range(count)]
    text = " ".join(spread(units, chain, sorted(rng.random() for _ in chain)))
    return wording.asking.show(text, " ".join(names), query=value, count=len(names))
