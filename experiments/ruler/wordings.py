"""What RULER's prompts say: one value for all tasks, and the one with words of our own.

The generators decide what is drawn and how much of it fits; a `Wordings` says how it reads.
`official.py` makes the one with the official texts.
"""

from __future__ import annotations

import dataclasses
import string

# Filler without a meaning to remember, for the tasks whose haystack is noise.
NOISE = (
    "Leaves fall from the tall trees.",
    "A small boat crosses the lake.",
    "The bread is still warm.",
    "Someone hums a tune.",
    "Evening comes once more.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """What stands around a text: an introduction, a question, and the answer's beginning.

    Attributes:
        template: introduction, `{context}`, white space and question. The question's fields are
            `{query}`, what is asked for, and `{count}`, how many answers are expected.
        prefix: how the answer begins, with the same fields.
        delimiter: what separates the two where no chat template does.
        example: layout of the worked example that goes before everything, of `{asked}` (the
            filled template), `{prefix}` and `{answer}`; None for tasks without one.

    Raises:
        ValueError: the template is not made as said, so that no question could be set apart.
    """

    template: str
    prefix: str
    delimiter: str = "\n"
    example: str | None = None

    def __post_init__(self) -> None:
        if self.template.count("{context}") != 1 or not self.question:
            raise ValueError("expected a template with {context} once, and a question after it")
        if "query" in _fields(self._head):
            raise ValueError("expected a template whose question stands after its {context}")

    @property
    def intro(self) -> str:
        """What goes before the text."""
        return self._head.format()

    @property
    def question(self) -> str:
        """Template of the question."""
        return self.template.partition("{context}")[2].lstrip()

    @property
    def prompt(self) -> str:
        """Template of the prompt, for a `SetSpec`.

        With a worked example the introduction belongs to the context, between the example and
        the text.
        """
        text = self.template.removeprefix(self._head).removesuffix(self.question)
        return ("" if self.example else self.intro) + text + "{input}"

    def show(self, text: str, answer: str, **fields: object) -> str:
        """The worked example with this text and answer; "" for tasks without one."""
        asked = self.template.format(context=text, **fields)
        prefix = self.prefix.format(**fields)
        return (self.example or "").format(asked=asked, prefix=prefix, answer=answer)

    @property
    def _head(self) -> str:
        return self.template.partition("{context}")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleWording:
    """The eight tasks with needles; all but `noise` and `last` have the field `{kind}`.

    Attributes:
        one: asks for one value.
        several: asks for several.
        needle: has the fields `{key}` and `{value}`.
        noise: the line that is repeated.
        last: goes before the last of several keys.

    Raises:
        ValueError: a template lacks a field.
    """

    one: Asking
    several: Asking
    needle: str
    noise: str
    last: str

    def __post_init__(self) -> None:
        for asking in (self.one, self.several):
            _check(asking.template, "query", "kind")
            _check(asking.prefix, "query", "kind")
        _check(self.needle, "kind", "key", "value")

    def asking(self, kind: str, *, plural: bool) -> Asking:
        """How values of a kind ("number" or "uuid") are asked for."""
        asking = self.several if plural else self.one
        return dataclasses.replace(
            asking,
            template=asking.template.replace("{kind}", kind),
            prefix=asking.prefix.replace("{kind}", kind),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingWording:
    """Variable tracking.

    Attributes:
        asking: around the text.
        noise: units of the noise in reading order, five sentences in all; assignments stand
            between units.
        first: an assignment of a value, of name and value.
        then: an assignment of a variable, of name and variable.

    Raises:
        ValueError: the question lacks its field.
    """

    asking: Asking
    noise: tuple[str, ...]
    first: str
    then: str

    def __post_init__(self) -> None:
        _check(self.asking.template, "query")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListWording:
    """Common words.

    Attributes:
        asking: around the list.
        item: an entry of the list, of number and word.
    """

    asking: Asking
    item: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassageWording:
    """Questions on passages.

    Attributes:
        asking: around the passages.
        passage: has the fields `{number}` and `{text}`.

    Raises:
        ValueError: a template lacks a field.
    """

    asking: Asking
    passage: str

    def __post_init__(self) -> None:
        _check(self.asking.template, "query")
        _check(self.passage, "number", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wordings:
    """The wordings of all 13 tasks."""

    niah: NeedleWording
    vt: TrackingWording
    cwe: ListWording
    fwe: Asking
    qa: PassageWording


def _fields(template: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(template)}


def _check(template: str, *fields: str) -> None:
    missing = set(fields) - _fields(template)
    if missing:
        raise ValueError(f"expected a template with the fields {sorted(missing)}: {template!r}")


OWN = Wordings(
    niah=NeedleWording(
        one=Asking(
            template="A secret {kind} is hidden in the text below. Remember it, you will be asked."
            "\n\n{context}\n\nWhich secret {kind} is kept by {query}?",
            prefix="According to the text, the secret {kind} kept by {query} is",
        ),
        several=Asking(
            template="Secret {kind}s are hidden in the text below. Remember them, you will be "
            "asked.\n\n{context}\n\nWhich secret {kind}s are kept by {query}? Name all of them.",
            prefix="According to the text, the secret {kind}s kept by {query} are",
        ),
        needle="A secret {kind} kept by {key} is {value}.",
        noise=" ".join(NOISE),
        last=" and ",
    ),
    vt=TrackingWording(
        asking=Asking(
            template="Assignments of variables are hidden in the text below. Remember which value "
            "each one gets.\n\n{context}\n\nWhich variables hold the value {query} in the text "
            "above? Name all of them.",
            prefix="Following the assignments, these {count} variables hold the value {query}:",
            example="{asked}\n{prefix} {answer}\n\n",
        ),
        noise=NOISE,
        first="VAR {} = {}.",
        then="VAR {} = VAR {}.",
    ),
    cwe=ListWording(
        asking=Asking(
            template="The numbered list below repeats some words more often than others. Keep in "
            "mind which words come most often.\n\n{context}\n\nWhich {count} words come most often "
            "in the list above?",
            prefix="The {count} words that come most often are:",
            example="{asked}\n{prefix} {answer}\n\n",
        ),
        item="{}. {}",
    ),
    fwe=Asking(
        template="A text in code words follows. Keep count of how often each code word occurs; "
        "dots mean nothing.\n\n{context}\n\nWhich {count} code words occur most often in the text "
        "above, dots aside? Name them without an explanation.",
        prefix="The {count} code words that occur most often are:",
    ),
    qa=PassageWording(
        asking=Asking(
            template="Passages follow, then a question about them. Reply with the bare answer and "
            "no other word.\n\n{context}\n\nReply with the bare answer and no other word.\n\n"
            "Question: {query}",
            prefix="Answer:",
        ),
        passage="Passage {number}:\n{text}",
    ),
)
