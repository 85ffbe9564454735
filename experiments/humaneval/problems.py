"""Problems in HumanEval's format: its own file, or six small ones of ours."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError
from experiments.core.files import parse_jsonl, read_bytes
from experiments.core.fitting import fit_units
from experiments.core.tasks import CountTokens, Row, SetSpec, TaskSet
from experiments.longbench.stdlib_text import code_files


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to be completed.

    Attributes:
        task_id: its name.
        prompt: its beginning: imports, signature, docstring.
        test: defines `check(candidate)`, which raises unless the function is right.
        entry_point: name of the function.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str


def _small(name: str, argument: str, says: str, cases: Sequence[tuple[Any, Any]]) -> Problem:
    checks = "".join(f"    assert candidate({given!r}) == {wanted!r}\n" for given, wanted in cases)
    return Problem(
        task_id=f"small/{name}",
        prompt=f'def {name}({argument}):\n    """{says}"""\n',
        test=f"def check(candidate):\n{checks}",
        entry_point=name,
    )


SMALL = (
    _small("add_one", "number", "Returns the number plus one.", [(1, 2), (-1, 0)]),
    _small("is_even", "number", "Tells whether a number is even.", [(4, True), (3, False)]),
    _small("last_item", "items", "Returns the last item of a list.", [([1, 2], 2), (["a"], "a")]),
    _small("total", "numbers", "Returns the sum of a list of numbers.", [([], 0), ([1, 2], 3)]),
    _small("backwards", "text", "Returns the text in reverse.", [("ab", "ba"), ("", "")]),
    _small("count_a", "text", "Counts the letter a in a text.", [("banana", 3), ("b", 0)]),
)


def read_problems(data: str) -> tuple[Problem, ...]:
    """The problems that `--data` names.

    Raises:
        UserError: the file is missing, unreadable or broken.
    """
    if data == "offline":
        return SMALL
    path = Path(data)
    if not path.is_file():
        raise UserError(f"--data {data}: no such file (HumanEval.jsonl or HumanEval.jsonl.gz)")
    return parse_jsonl(read_bytes(path), parse_problem, str(path))


def parse_problem(record: Any) -> Problem:
    """Checks a line of HumanEval's file.

    Raises:
        ValueError: naming the field that is missing or of the wrong type.
    """
    values = []
    for field in dataclasses.fields(Problem):
        value = record.get(field.name) if isinstance(record, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {field.name!r} must be a string that is not empty")
        values.append(value)
    if not values[3].isidentifier():
        raise ValueError(f"field 'entry_point' must be a name, not {values[3]!r}")
    return Problem(*values)


def build_sets(
    problems: Sequence[Problem],
    *,
    lengths: Sequence[int],
    samples: int,
    max_new_tokens: int,
    seed: int,
    count: CountTokens,
) -> list[TaskSet]:
    """A set for each length: every problem, `samples` times, behind the end of other source code.

    Args:
        problems: what is asked.
        lengths: most tokens of prompt and generation together.
        samples: rows of each problem, one after the other; they differ in their sampling alone.
        max_new_tokens: length of the generation.
        seed: of the source code.
        count: tokens of the whole prompt that a row makes.

    Raises:
        UserError: a problem does not fit into a length.
    """
    files = code_files()
    sets = []
    for length in lengths:
        spec = SetSpec(
            name=str(length),
            prompt="{context}\n\n\n{input}",
            max_new_tokens=max_new_tokens,
            metric="tests",
            chat=False,
        )
        rows = []
        for number, problem in enumerate(problems):
            rng = random.Random(f"humaneval-{seed}-{number}")
            names = rng.sample(sorted(files), len(files))
            pool = [line for name in names for line in files[name]]

            def build(
                fragment: str,
                lines: Sequence[str],
                problem: Problem = problem,
            ) -> Row:
                # Whole lines only: half a line would be no Python.
                del fragment
                return Row(
                    input=problem.prompt,
                    context="\n".join(lines),
                    answers=(problem.prompt, problem.test, problem.entry_point),
                    length=0,
                    row_id=problem.task_id,
                )

            parts = fit_units(
                pool,
                lambda *parts: count(spec, build(*parts)),  # noqa: B023 - used at once
                length - max_new_tokens,
                least=1,
                what=f"{length}, {problem.task_id}",
            )
            row = build(*parts)
            row = dataclasses.replace(row, length=count(spec, row) + max_new_tokens)
            rows += [row] * samples
        sets.append(TaskSet(spec=spec, rows=tuple(rows), source=f"{length} tokens, seed {seed}"))
    return sets
