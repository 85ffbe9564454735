"""The 13 tasks: prompts, generation lengths, metrics, and who makes their rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from experiments.core.errors import UserError
from experiments.core.tasks import CountTokens, Measure, Row, SetSpec, TaskSet
from experiments.core.uncertainty import Average
from experiments.ruler.draws import Draw
from experiments.ruler.niah import NIAH, make_niah, niah_prompt
from experiments.ruler.qa import QA_PROMPT, make_qa
from experiments.ruler.sources import MissingSource, Sources
from experiments.ruler.tracking import TRACKING_PROMPT, make_tracking
from experiments.ruler.words import COMMON_PROMPT, FREQUENT_PROMPT, make_common, make_frequent


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the 13 tasks.

    Attributes:
        prompt: template of the prompt.
        max_new_tokens: length of the generation.
        make: makes a row; None for the question tasks.
        questions: the data set that a question task draws on, or None.
    """

    prompt: str
    max_new_tokens: int
    make: Callable[[Sources, Draw], Row] | None = None
    questions: str | None = None

    @property
    def metric(self) -> str:
        """Name of the metric (see `scoring.METRICS`)."""
        return "string_match_part" if self.questions else "string_match_all"


TASKS: dict[str, Task] = {
    **{
        name: Task(niah_prompt(needles), 128, functools.partial(make_niah, needles))
        for name, needles in NIAH.items()
    },
    "vt": Task(TRACKING_PROMPT, 30, lambda _, draw: make_tracking(draw)),
    "cwe": Task(COMMON_PROMPT, 120, make_common),
    "fwe": Task(FREQUENT_PROMPT, 50, lambda _, draw: make_frequent(draw)),
    "qa_1": Task(QA_PROMPT, 32, questions="squad"),
    "qa_2": Task(QA_PROMPT, 32, questions="hotpotqa"),
}


def make_spec(name: str, length: int, *, chat: bool) -> SetSpec:
    """How a task of a length is asked and scored; the set is called "LENGTH/TASK"."""
    task = TASKS[name]
    return SetSpec(
        name=f"{length}/{name}",
        prompt=task.prompt,
        max_new_tokens=task.max_new_tokens,
        metric=task.metric,
        chat=chat,
    )


def make_rows(
    name: str, spec: SetSpec, length: int, sources: Sources, *, seed: int, count: CountTokens
) -> Iterator[Row]:
    """Rows of a task, one after the other; a question task ends with its questions.

    Args:
        name: the task.
        spec: from `make_spec`.
        length: most tokens of prompt and generation together.
        sources: the texts.
        seed: of everything that is drawn.
        count: counts a prompt's tokens.

    Yields:
        Rows of at most `length` tokens, and fewer by less than 8 (16 for questions: the heading
        of one more passage must fit). Row i depends on task, length, seed, i, the texts and the
        tokenizer, and on nothing else.

    Raises:
        MissingSource: a text cannot be had.
        UserError: the length is too small, or the texts are too short for it.
    """
    task = TASKS[name]
    limit = length - task.max_new_tokens
    questions = sources.questions(task.questions) if task.questions else None
    asked = list(questions.questions) if questions else []
    # One order for all lengths, so that these have many of their questions in common.
    random.Random(f"{name}-{seed}").shuffle(asked)
    index = 0
    while True:
        row_id = f"{name}-{length}-{seed}-{index}"
        draw = Draw(
            what=spec.name,
            rng=random.Random(row_id),
            length=length,
            limit=limit,
            tokens=lambda row: count(spec, row),
        )
        row: Row | None
        if questions is None:
            assert task.make is not None
            row = task.make(sources, draw)
        else:
            if not asked:
                return
            row = make_qa(questions, asked.pop(), draw)
        if row is None:
            continue
        others = {"task": name, "length": length, "seed": seed, **(row.others or {})}
        tokens = count(spec, row) + spec.max_new_tokens
        yield dataclasses.replace(row, length=tokens, row_id=row_id, others=others)
        index += 1


def build_sets(
    names: Sequence[str], sources: Sources, measure: Measure, *, explicit: bool
) -> tuple[list[TaskSet], list[str]]:
    """Generates the sets of a run.

    Args:
        names: tasks, in order.
        sources: the texts.
        measure: what the sets are made to.
        explicit: True when the user named the tasks: one whose text is missing is then an error,
            else it is left out.

    Returns:
        The sets, and what there is to say of tasks that were left out or are short of rows.

    Raises:
        UserError: as `make_rows`; or no task is left.
    """
    sets, notes, missing = [], [], dict[str, str]()
    for length in measure.lengths:
        for name in names:
            if name in missing:
                continue
            spec = make_spec(name, length, chat=measure.chat)
            generated = make_rows(
                name, spec, length, sources, seed=measure.seed, count=measure.count
            )
            try:
                made = tuple(itertools.islice(generated, measure.rows))
            except MissingSource as error:
                if explicit:
                    raise UserError(f"--tasks {name}: {error}") from None
                missing[name] = str(error)
                notes.append(f"left out: {name} ({error})")
                continue
            if not made:
                raise UserError(f"set {spec.name}: no question fits into {length} tokens")
            if len(made) < measure.rows:
                notes.append(f"{spec.name}: the data hold {len(made)} questions that fit")
            source = f"generated, {length} tokens, seed {measure.seed}"
            sets.append(TaskSet(spec=spec, rows=made, source=source))
    if not sets:
        raise UserError(f"no task can be generated: {'; '.join(missing.values())}")
    return sets, notes


def averages_of(sets: Sequence[TaskSet]) -> list[Average]:
    """The averages that the sets allow, for each length.

    The benchmark's is that over 13 tasks. Papers also print one over the 11 tasks without
    questions. Where neither set of tasks is complete, it is the mean over those that there are.
    """
    by_length: dict[str, dict[str, str]] = {}
    for task in sets:
        length, name = task.spec.name.split("/")
        by_length.setdefault(length, {})[name] = task.spec.name
    result = []
    synthetic = [name for name, task in TASKS.items() if not task.questions]
    for length, found in by_length.items():
        complete = {
            f"average of all {len(TASKS)} tasks": [*TASKS],
            f"average of the {len(synthetic)} tasks without QA": synthetic,
        }
        named = {label: names for label, names in complete.items() if found.keys() >= set(names)}
        if not named and len(found) > 1:
            named = {f"mean of these {len(found)} tasks": [*found]}
        for label, names in named.items():
            result.append(Average(f"{length}: {label}", tuple(found[name] for name in names)))
    return result
