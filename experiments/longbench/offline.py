"""The offline suite: small tasks in LongBench's row format, made from what Python carries.

Its scores are not LongBench scores. Every set is a completion (no chat template), its answers
are several tokens long, and all but those of `code_line` stand word for word in the context:
with the question inside the prompt the first token of an answer comes from the full prefill, so
a one-token answer would say nothing about eviction.

- `kv_needle`: four people with their secret codes in running prose; the code of one is asked.
- `passage_retrieval`: passages with titles; the beginning of the one with a given title is asked.
- `quote_recall`: the beginning of one sentence of a text is given, its rest is asked.
- `few_shot`: lines of code with labels of several words; the label of one more line is asked.
- `code_line`: the next line of a standard-library module.

The same seed, length, tokenizer and Python version give the same rows (see `stdlib_text`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from experiments.core.fitting import fit_units
from experiments.core.tasks import Row, SetSpec, TaskSet, fill_prompt
from experiments.longbench.offline_tasks import MAKERS, CountTokens

OFFLINE_SETS: dict[str, SetSpec] = {
    spec.name: spec
    for spec in (
        SetSpec(
            name="kv_needle",
            prompt=(
                "Remember the secret codes that are hidden in this text.\n\n{context}\n\n"
                "Here is one of the secret codes again.\n\n"
                "The secret code of {input} is"
            ),
            max_new_tokens=20,
            metric="words_in_order",
            chat=False,
            first_line_only=True,
            stop_at_newline=True,
        ),
        SetSpec(
            name="passage_retrieval",
            prompt=(
                "Read these passages. Each has a title.\n\n{context}\n\n"
                "Here is one of the passages again, word for word.\n\n"
                "Title: {input}\n"
            ),
            max_new_tokens=24,
            metric="words_in_order",
            chat=False,
            first_line_only=True,
            stop_at_newline=True,
        ),
        SetSpec(
            name="quote_recall",
            prompt=(
                "Read this text.\n\n{context}\n\n"
                "Here is one of its sentences again, word for word.\n\n{input}"
            ),
            max_new_tokens=32,
            metric="words_in_order",
            chat=False,
            first_line_only=True,
            stop_at_newline=True,
        ),
        SetSpec(
            name="few_shot",
            prompt="Say what each line of Python code is.\n\n{context}\n\n{input}",
            max_new_tokens=12,
            metric="classification",
            chat=False,
            first_line_only=True,
            stop_at_newline=True,
        ),
        SetSpec(
            name="code_line",
            prompt="Complete this Python code.\n\n{context}",
            max_new_tokens=32,
            metric="code_similarity",
            chat=False,
        ),
    )
}


def build_suite(
    specs: Sequence[SetSpec], *, count_tokens: CountTokens, length: int, rows: int, seed: int
) -> list[TaskSet]:
    """Generates sets of the offline suite.

    Args:
        specs: which sets, from `OFFLINE_SETS`.
        count_tokens: length of a text in the model's tokens.
        length: length of each prompt in tokens; prompts end at most a few tokens below it.
        rows: rows in each set.
        seed: of everything that is drawn.

    Raises:
        UserError: if `length` is too small for a set.
    """
    return [
        TaskSet(
            spec=spec,
            rows=tuple(
                build_row(spec, count_tokens, length, f"{spec.name}-{length}-{seed}-{i}")
                for i in range(rows)
            ),
            source=f"generated, {length} tokens, seed {seed}",
        )
        for spec in specs
    ]


def build_row(spec: SetSpec, count_tokens: CountTokens, length: int, row_id: str) -> Row:
    """Generates one row, of which `row_id` is the seed.

    Raises:
        UserError: if `length` is too small for the set.
    """
    task = MAKERS[spec.name](random.Random(row_id), row_id, length, count_tokens)

    def tokens_of(fragment: str, units: list[str]) -> int:
        return count_tokens(fill_prompt(spec.prompt, task.make_row(fragment, units)))

    fragment, units = fit_units(task.pool, tokens_of, length, least=task.least, what=spec.name)
    return task.make_row(fragment, units)
