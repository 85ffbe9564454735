"""What a task set is: rows of context, question and answers, and how they are asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_FIELD = re.compile(r"\{(context|input)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One question about a long text.

    Attributes:
        input: the question, possibly empty when the set's prompt says it all.
        context: the long text.
        answers: the expected answers, none where nothing is asked; the set's metric says what
            they count.
        length: size of the row as its source counts it: words in LongBench, tokens in RULER.
        all_classes: the labels of a classification set, else None.
        row_id: the source's identifier, or None.
        answer_prefix: how the answer begins; the model goes on from there.
        others: what else is known of the row, as plain JSON values, or None.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    all_classes: tuple[str, ...] | None = None
    row_id: str | None = None
    answer_prefix: str = ""
    others: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSpec:
    """How the rows of one set are asked and scored.

    Attributes:
        name: the set's name, also its file name.
        prompt: template with the fields `{context}` and `{input}`.
        max_new_tokens: length of the generation.
        metric: name of the metric, for the benchmark's scorer.
        chat: False keeps the prompt free of the chat template (few-shot and completion sets).
        first_line_only: score the first non-empty line of the prediction only.
        stop_at_newline: end the generation at the first newline.
    """

    name: str
    prompt: str
    max_new_tokens: int
    metric: str
    chat: bool = True
    first_line_only: bool = False
    stop_at_newline: bool = False

    def __post_init__(self) -> None:
        if "{context}" not in self.prompt:
            raise ValueError(f"the prompt of set {self.name!r} has no {{context}} field")

    @property
    def question(self) -> str:
        """The part of the template that follows the context."""
        return self.prompt.partition("{context}")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSet:
    """A set together with the rows that will be asked.

    Attributes:
        spec: prompt, metric and generation length.
        rows: the rows, in order.
        source: where they come from, in words or as a file name.
    """

    spec: SetSpec
    rows: tuple[Row, ...]
    source: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the rows' content, whatever file or compression they came in."""
        return rows_checksum(self.rows)


# (set, row) -> tokens of the whole prompt that the row makes.
CountTokens = Callable[[SetSpec, Row], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """What tasks are made to.

    Attributes:
        lengths: most tokens of prompt and generation together, one after the other.
        rows: rows of each kind at each length.
        seed: of everything that is drawn.
        chat: use the model's chat template.
        count: tokens of the whole prompt that a row makes.
    """

    lengths: tuple[int, ...]
    rows: int
    seed: int
    chat: bool
    count: CountTokens


def fill_prompt(template: str, row: Row) -> str:
    """Fills a template's `{context}` and `{input}` fields with a row's texts.

    One pass, so that braces inside the texts stay what they are (`str.format` would be the same
    for well-formed templates but stumbles over any other brace).
    """
    values = {"context": row.context, "input": row.input}
    return _FIELD.sub(lambda field: values[field.group(1)], template)


def rows_checksum(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows' fields in a canonical spelling."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(dataclasses.asdict(row), sort_keys=True, ensure_ascii=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
