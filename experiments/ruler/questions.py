"""Rows of SQuAD and HotpotQA, from files and from the hub, as questions on a pool of passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: the question.
        answers: the accepted answers, each once.
        own: numbers of the passages that the answer needs.
        near: numbers of passages that are close to them: of the same article, or given along.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions and the passages that they, and their haystacks, are made of."""

    passages: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class QuestionRow:
    """One row of a data set, whatever the layout it came in.

    Attributes:
        question: the question.
        answers: accepted answers; none for a question without an answer, which is left out.
        own: passages that the answer needs.
        near: passages given along with the question.
        article: what else belongs together; "" for none.
    """

    question: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()
    article: str = ""


def parse_squad(record: Any) -> QuestionRow:
    """Checks a row of SQuAD: title, context, question, answers.text.

    Raises:
        ValueError: naming the field that is missing or of the wrong type.
    """
    title, context, question = (_text(record, name) for name in ("title", "context", "question"))
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("field 'answers' must hold a list 'text' of strings")
    return QuestionRow(question, tuple(dict.fromkeys(texts)), (context,), article=title)


def parse_hotpot(record: Any) -> QuestionRow:
    """Checks a row of HotpotQA: question, answer, context and supporting facts.

    The last two are lists of pairs, as the data set's authors publish them, or columns, as the
    hub has them.

    Raises:
        ValueError: naming the field that is missing or of the wrong type.
    """
    question, answer = _text(record, "question"), _text(record, "answer")
    context = _pairs(record, "context", "title", "sentences")
    facts = {title for title, _ in _pairs(record, "supporting_facts", "title", "sent_id")}
    passages = {}
    for title, sentences in context:
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise ValueError("field 'context' must hold titles with lists of sentences")
        passages[str(title)] = f"{title}\n{''.join(sentences)}"
    if not facts <= passages.keys():
        raise ValueError("field 'supporting_facts' names a title that is not in 'context'")
    own = tuple(text for title, text in passages.items() if title in facts)
    near = tuple(text for title, text in passages.items() if title not in facts)
    return QuestionRow(question, (answer,), own, near)


def pool_questions(rows: Iterable[QuestionRow]) -> Questions:
    """Numbers the passages of all rows, and refers the questions to them."""
    rows = list(rows)
    passages = sorted({text for row in rows for text in (*row.own, *row.near)})
    number = {text: i for i, text in enumerate(passages)}
    articles: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.article:
            articles.setdefault(row.article, {}).update(dict.fromkeys(row.own))

    def numbers(texts: Iterable[str], but: Sequence[str] = ()) -> tuple[int, ...]:
        return tuple(number[text] for text in texts if text not in but)

    return Questions(
        tuple(passages),
        tuple(
            Question(
                row.question,
                row.answers,
                numbers(row.own),
                numbers([*row.near, *articles.get(row.article, ())], row.own),
            )
            for row in rows
            if row.answers
        ),
    )


def _text(record: Any, name: str) -> str:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a string that is not empty")
    return value


def _pairs(record: Any, name: str, first: str, second: str) -> list[tuple[Any, Any]]:
    value = record.get(name)
    if isinstance(value, dict) and isinstance(value.get(first), list):
        value = list(zip(value[first], value.get(second) or (), strict=False))
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"field {name!r} must be a list of pairs that is not empty")
    return [(pair[0], pair[1]) for pair in pairs]
