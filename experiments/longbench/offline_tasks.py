"""How a row of each set of the offline suite is drawn and put together (see `offline`)."""

from __future__ import annotations

import collections
import functools
import itertools
import keyword
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.core.errors import UserError
from experiments.core.fitting import last_good
from experiments.core.tasks import Row
from experiments.longbench.stdlib_text import code_files, prose_sentences

CountTokens = Callable[[str], int]


class OfflineTask(NamedTuple):
    """A row without its filler: what was drawn for it, and how it is put together.

    Attributes:
        pool: the filler's units (sentences, lines, examples) in reading order; the last ones are
            used.
        least: units that must fit.
        make_row: the row with the end of the text before, possibly empty, and whole units after it.
    """

    pool: Sequence[str]
    least: int
    make_row: Callable[[str, list[str]], Row]


_ADJECTIVES = """
amber crimson silver golden quiet hidden frozen ancient gentle hollow bright purple rapid
distant wooden velvet copper lonely narrow stormy
"""
_NOUNS = """
falcon harbor lantern meadow canyon orchard anchor violin glacier castle compass thunder
feather garden marble river saddle tunnel window basket
"""
_NAMES = """
Margaret Oscar Priya Kenji Fatima Ludwig Chiara Tobias Ingrid Mateo Zuleika Harold Noemi Viktor
Beatrice Samir
"""

# Label -> what such a line looks like. No label is part of another.
LINE_KINDS: dict[str, re.Pattern[str]] = {
    "an import of names": re.compile(r"(import [\w.]+|from [\w.]+ import \w+)"),
    "the head of a function": re.compile(r"def \w+\(.*\):"),
    "a new class": re.compile(r"class \w+(\(.*\))?:"),
    "a value given back": re.compile(r"return \S.*[\w)\]}'\"]"),
    "an error being raised": re.compile(r"raise \w+\(.*\)"),
    "a choice on a condition": re.compile(r"if .+:"),
    "the start of a loop": re.compile(r"(for .+ in .+|while .+):"),
}


def line_kind(line: str) -> str | None:
    """The label of a line of code, None for a line of no kind or of several."""
    kinds = [label for label, form in LINE_KINDS.items() if form.fullmatch(line)]
    return kinds[0] if len(kinds) == 1 else None


def _row(row_id: str, question: str, context: str, answer: str, classes: Sequence[str] = ()) -> Row:
    return Row(
        input=question,
        context=context,
        answers=(answer,),
        length=len(context.split()) + len(question.split()),
        all_classes=tuple(classes) or None,
        row_id=row_id,
    )


def _join(separator: str, fragment: str, units: Sequence[str]) -> str:
    return separator.join([fragment, *units] if fragment else units)


def _prose(rng: random.Random) -> list[str]:
    # Reading order from a random place on, so that rows differ.
    sentences = prose_sentences()
    start = rng.randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def _titles(rng: random.Random) -> list[str]:
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    rng.shuffle(adjectives)
    rng.shuffle(nouns)
    # No word comes twice in the first ones.
    titles = [
        f"{a} {b}"
        for i in range(len(nouns))
        for a, b in zip(adjectives, nouns[i:] + nouns[:i], strict=True)
    ]
    titles = [title.title() for title in titles]
    return titles


def _askable(pool: Sequence[str], length: int, count_tokens: CountTokens, what: str) -> int:
    """How many last units of a pool are certain to be in a prompt.

    What is asked is drawn among these before the length is fitted: otherwise the question would
    change with every sentence more, and the length with the question.

    Raises:
        UserError: if the pool would have to be repeated: what is asked would not be unique.
    """
    tokens = count_tokens("\n".join(pool))
    if length > tokens:
        raise UserError(f"set {what}: the text that Python carries ends at {tokens} tokens")

    def certain(count: int) -> bool:
        # A quarter is left for the question, the frame and the first, cut unit.
        return count_tokens("\n".join(pool[len(pool) - count :])) <= 0.75 * length

    return last_good(certain, 0, len(pool))


def _kv_needle(
    rng: random.Random, row_id: str, length: int, count_tokens: CountTokens
) -> OfflineTask:
    del length, count_tokens
    keys = 4
    people = rng.sample(_NAMES.split(), keys)
    words = [title.lower() for title in _titles(rng)[:keys]]
    secrets = [f"{pair} {rng.randrange(100_000, 1_000_000)}" for pair in words]
    depths = sorted(rng.uniform(0.02, 0.98) for _ in range(keys))
    asked = rng.randrange(keys)

    def make_row(fragment: str, units: list[str]) -> Row:
        parts, done = [], 0
        for name, secret, depth in zip(people, secrets, depths, strict=True):
            until = round(depth * len(units))
            parts += [*units[done:until], f"\nThe secret code of {name} is {secret}.\n"]
            done = until
        context = _join(" ", fragment, [*parts, *units[done:]])
        context = context.replace(" \n", "\n").replace("\n ", "\n").strip()
        return _row(row_id, people[asked], context, secrets[asked])

    return OfflineTask(_prose(rng), keys, make_row)


def _passage_retrieval(
    rng: random.Random, row_id: str, length: int, count_tokens: CountTokens
) -> OfflineTask:
    size, titles, pool = 3, _titles(rng), _prose(rng)
    passages = _askable(pool, length, count_tokens, "passage_retrieval") // size - 1
    if passages < 1:
        raise UserError(f"set passage_retrieval: {length} tokens are too few for it")
    from_end = rng.randint(1, passages)

    def make_row(fragment: str, units: list[str]) -> Row:
        # Passages are counted off from the end: the first one may be short, or begin anywhere.
        first = len(units) % size or size
        bounds = [0, *range(first, len(units) + 1, size)]
        passages = [units[a:b] for a, b in itertools.pairwise(bounds)]
        texts = [_join(" ", fragment, passages[0]), *map(" ".join, passages[1:])]
        blocks = [f"Title: {title}\n{text}" for title, text in zip(titles, texts, strict=False)]
        beginning = " ".join(passages[-from_end][0].split(" ")[:12])
        title = titles[len(passages) - from_end]
        return _row(row_id, title, "\n\n".join(blocks), beginning)

    return OfflineTask(pool, size * from_end + 1, make_row)


def _quote_recall(
    rng: random.Random, row_id: str, length: int, count_tokens: CountTokens
) -> OfflineTask:
    given, pool = 6, _prose(rng)
    reach = _askable(pool, length, count_tokens, "quote_recall")
    starts = collections.Counter(tuple(unit.split(" ")[:given]) for unit in pool)
    asked = [
        words
        for words in (unit.split(" ") for unit in pool[len(pool) - reach :])
        if 12 <= len(words) <= 22 and starts[tuple(words[:given])] == 1
    ]
    if not asked:
        raise UserError(f"set quote_recall: {length} tokens are too few for it")
    words = rng.choice(asked)

    def make_row(fragment: str, units: list[str]) -> Row:
        context = _join(" ", fragment, units)
        return _row(row_id, " ".join(words[:given]), context, " ".join(words[given:]))

    return OfflineTask(pool, len(pool) - pool.index(" ".join(words)), make_row)


def _few_shot(
    rng: random.Random, row_id: str, length: int, count_tokens: CountTokens
) -> OfflineTask:
    del length, count_tokens
    by_kind: dict[str, list[str]] = {label: [] for label in LINE_KINDS}
    for line in dict.fromkeys(line.strip() for lines in code_files().values() for line in lines):
        kind = line_kind(line)
        if kind is not None and 8 <= len(line) <= 60:
            by_kind[kind].append(line)
    for lines in by_kind.values():
        rng.shuffle(lines)
    asked = rng.choice(list(LINE_KINDS))
    question = by_kind[asked].pop()
    pool: list[str] = []
    # Rounds with one example of each kind: every label is near the end and all along.
    for examples in zip(*by_kind.values(), strict=False):
        pairs = list(zip(examples, LINE_KINDS, strict=True))
        rng.shuffle(pairs)
        pool += [f"Line: {line}\nKind: {kind}" for line, kind in pairs]

    def make_row(fragment: str, units: list[str]) -> Row:
        context = _join("\n\n", fragment, units)
        return _row(row_id, f"Line: {question}\nKind:", context, asked, tuple(LINE_KINDS))

    return OfflineTask(pool, len(LINE_KINDS), make_row)


def _code_line(
    rng: random.Random, row_id: str, length: int, count_tokens: CountTokens
) -> OfflineTask:
    del length, count_tokens
    files = code_files()
    lines_of, targets = rng.choice([(name, t) for name in files if (t := _targets(files[name]))])
    target = rng.choice(targets)
    # Where the module begins too late, other modules go before it.
    others = [line for name in files if name != lines_of for line in files[name]]
    lines = files[lines_of]

    def make_row(fragment: str, units: list[str]) -> Row:
        return _row(row_id, "", _join("\n", fragment, units), lines[target])

    return OfflineTask([*others, *lines[:target]], 10, make_row)


@functools.cache
def _targets(lines: tuple[str, ...]) -> list[int]:
    return [index for index in range(40, len(lines)) if _guessable(lines, index)]


def _guessable(lines: Sequence[str], index: int) -> bool:
    """Whether a line is code of a common shape whose names all occur in the 40 lines before."""
    line = lines[index].strip()
    if not 15 <= len(line) <= 60 or len(line.split()) < 2 or any(m in line for m in "#`\"'/"):
        return False
    if not re.fullmatch(r"(return|raise|if|for|while|del) .*|[\w.\[\]]+ = .*", line):
        return False
    names = set(re.findall(r"[A-Za-z_]\w{2,}", line)) - set(keyword.kwlist)
    return names <= set(re.findall(r"\w+", "\n".join(lines[index - 40 : index])))


# Set -> (generator, row id, length, token counter) -> task.
MAKERS: dict[str, Callable[[random.Random, str, int, CountTokens], OfflineTask]] = {
    "kv_needle": _kv_needle,
    "passage_retrieval": _passage_retrieval,
    "quote_recall": _quote_recall,
    "few_shot": _few_shot,
    "code_line": _code_line,
}
