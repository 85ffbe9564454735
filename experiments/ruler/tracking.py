"""Variable tracking: a chain of assignments in noise, all of whose variables hold one value."""

from __future__ import annotations

import itertools
import random
import string

from experiments.core.fitting import fit_units
from experiments.core.tasks import Row
from experiments.ruler.draws import NOISE, Draw, depths_of, distinct, make_row, spread

TRACKING_PROMPT = "{context}\n\n{input}"

_HOPS = 4
_INTRO = (
    "Assignments of variables are hidden in the text below. Remember which value each one gets."
)
# Sentences of noise in the worked example: that of the official set-up has 500 tokens in all.
_EXAMPLE_NOISE = 60


def make_tracking(draw: Draw) -> Row:
    """Draws a chain of four hops and hides it in as much noise as fits, after a worked example.

    The example has names of three letters instead of five, and about an eighth of a prompt below
    4,096 tokens.

    Raises:
        UserError: the length is too small.
    """
    rng = draw.rng
    value, other = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    names, chain = _draw_chain(rng, value, 5)
    depths = sorted(rng.random() for _ in chain)
    example = _example(rng, other, min(_EXAMPLE_NOISE, draw.length // 64))
    question, prefix = _ask(value)

    def build(fragment: str, units: list[str]) -> Row:
        haystack = [" ".join(fragment.split()), *units] if fragment else units
        text = " ".join(spread(haystack, chain, depths))
        context = f"{example}\n\n{_INTRO}\n\n{text}"
        return make_row(context, question, prefix, names, depths_of(text, chain))

    fragment, units = fit_units(
        NOISE,
        lambda *parts: draw.tokens(build(*parts)),
        draw.limit,
        least=len(chain),
        what=draw.what,
    )
    return build(fragment, units)


def _draw_chain(rng: random.Random, value: str, letters: int) -> tuple[list[str], list[str]]:
    """Names, and the assignments in their order."""
    names = distinct(
        lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), _HOPS + 1, set()
    )
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    return names, chain


def _ask(value: str) -> tuple[str, str]:
    return (
        f"Which variables hold the value {value} in the text above? Name all of them.",
        f"Following the assignments, these {_HOPS + 1} variables hold the value {value}:",
    )


def _example(rng: random.Random, value: str, noise: int) -> str:
    names, chain = _draw_chain(rng, value, 3)
    units = [NOISE[i % len(NOISE)] for i in range(noise)]
    text = " ".join(spread(units, chain, sorted(rng.random() for _ in chain)))
    question, prefix = _ask(value)
    return f"{_INTRO}\n\n{text}\n\n{question}\n{prefix} {' '.join(names)}"
