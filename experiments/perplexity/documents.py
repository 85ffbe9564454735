"""The documents of a run: stretches of texts, all of the same number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from experiments.core.errors import UserError
from experiments.core.prompts import Tokenizer
from experiments.core.tasks import Row, SetSpec, TaskSet
from experiments.core.texts import Text

MODES = ("decode", "prefill")


def cut_documents(
    texts: Sequence[Text], tokenizer: Tokenizer, *, length: int, rows: int
) -> tuple[Row, ...]:
    """Cuts texts into stretches that do not overlap.

    The first stretch of every text comes first, then the second ones, and so on. Each begins with
    the token that begins a text, where the model has one.

    Args:
        texts: the texts.
        tokenizer: the model's.
        length: tokens of each stretch.
        rows: most stretches.

    Raises:
        UserError: no text is long enough.
    """
    start = tokenizer.encode("")
    size = length - len(start)
    ids = [tokenizer.encode(text.text, add_bos=False, parse_special=False) for text in texts]
    found: list[Row] = []
    for number in range(max(map(len, ids)) // size):
        for text, body in zip(texts, ids, strict=True):
            part = body[number * size : (number + 1) * size]
            if len(part) == size:
                found.append(
                    Row(
                        input="",
                        context=tokenizer.decode(part),
                        answers=(),
                        length=length,
                        row_id=f"{text.name}@{number * size}",
                        others={"tokens": [*start, *part]},
                    )
                )
    if not found:
        raise UserError(
            f"--length {length}: the longest text has {max(map(len, ids)) + len(start)} tokens"
        )
    return tuple(itertools.islice(found, rows))


def build_sets(
    documents: Sequence[Row], modes: Sequence[str], *, length: int, prompt: int, source: str
) -> list[TaskSet]:
    """A set for each mode, named after it; all ask the same documents.

    Args:
        documents: from `cut_documents`.
        modes: of `MODES`.
        length: tokens of each document.
        prompt: tokens that "prefill" evicts from.
        source: where the texts come from, in words.
    """
    follow = {"decode": length - 1, "prefill": length - prompt}
    return [
        TaskSet(
            spec=SetSpec(
                name=mode,
                prompt="{context}",
                max_new_tokens=follow[mode],
                metric="negative_log_likelihood",
                chat=False,
            ),
            rows=tuple(documents),
            source=source,
        )
        for mode in modes
    ]
