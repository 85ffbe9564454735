"""The four tasks that can be generated at any length, for any tokenizer."""

from __future__ import annotations

import dataclasses
import json
import random
import uuid
from collections.abc import Callable

from experiments.core.errors import UserError
from experiments.core.fitting import fit_units, largest_fit
from experiments.core.tasks import CountTokens, Measure, Row, SetSpec, TaskSet
from experiments.infinitebench.tasks import TASKS, make_spec
from experiments.ruler.draws import NOISE, depths_of, spread

# Shortest pair of `kv_retrieval`, in tokens: no tokenizer has tokens for whole identifiers.
_LEAST_PAIR = 16


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row to be made.

    Attributes:
        what: name of the set, for messages.
        rng: source of everything that is drawn.
        limit: most tokens of the prompt.
        tokens: length in tokens of the whole prompt that a row makes.
    """

    what: str
    rng: random.Random
    limit: int
    tokens: Callable[[Row], int]


def build_sets(names: tuple[str, ...], measure: Measure) -> list[TaskSet]:
    """Generates a set for each length and task, called "LENGTH/TASK".

    Args:
        names: tasks, of `GENERATED`.
        measure: what the sets are made to. Row i depends on task, length, seed, i and the
            tokenizer, and on nothing else.

    Raises:
        UserError: a length is too small.
    """
    sets = []
    for length in measure.lengths:
        for name in names:
            spec = make_spec(name, f"{length}/{name}", chat=measure.chat)
            made = tuple(
                _make_row(name, spec, length, f"{name}-{length}-{measure.seed}-{i}", measure.count)
                for i in range(measure.rows)
            )
            source = f"generated, {length} tokens, seed {measure.seed}"
            sets.append(TaskSet(spec=spec, rows=made, source=source))
    return sets


def _make_row(name: str, spec: SetSpec, length: int, row_id: str, count: CountTokens) -> Row:
    draw = Draw(
        what=spec.name,
        rng=random.Random(row_id),
        limit=length - spec.max_new_tokens,
        tokens=lambda row: count(spec, _with_prefix(row, name)),
    )
    row = _with_prefix(GENERATED[name](draw), name)
    return dataclasses.replace(row, length=count(spec, row) + spec.max_new_tokens, row_id=row_id)


def _with_prefix(row: Row, name: str) -> Row:
    return dataclasses.replace(row, answer_prefix=TASKS[name].prefix)


def make_passkey(draw: Draw) -> Row:
    """Five digits in a text that repeats itself."""
    key = "".join(draw.rng.choices("0123456789", k=5))
    hidden = f"The pass key is {key}. Keep it in mind. {key} is the pass key."
    return _in_noise(draw, hidden, key, "What is the pass key?")


def make_number_string(draw: Draw) -> Row:
    """Ten digits, many of them doubled, in a text that repeats itself."""
    digits = draw.rng.choices("0123456789", k=5)
    while len(digits) < 10:
        at = draw.rng.randrange(len(digits))
        digits.insert(at, digits[at])
    key = "".join(digits)
    hidden = f"The row of digits is {key}. Keep it in mind. {key} is the row of digits."
    return _in_noise(draw, hidden, key, "What is the row of digits?")


def make_kv_retrieval(draw: Draw) -> Row:
    """A JSON object of random identifiers; the value of one key is asked."""
    share = draw.rng.random()
    pairs = [
        (_identifier(draw.rng), _identifier(draw.rng)) for _ in range(draw.limit // _LEAST_PAIR + 1)
    ]

    def build(count: int) -> Row:
        key, value = pairs[int(share * count)]
        context = json.dumps(dict(pairs[:count]))
        question = f'Which value belongs to the key "{key}"?'
        return _row(context, question, value, depths_of(context, [f'"{key}"'])[0])

    return build(_most(draw, lambda count: draw.tokens(build(count)), least=1, most=len(pairs)))


def make_math_find(draw: Draw) -> Row:
    """A list of whole numbers; the largest, the smallest or the median is asked."""
    rng = draw.rng
    low = rng.randrange(5, 40)
    high = rng.randrange(low + 20, 95)
    wanted = rng.choice(("largest", "smallest", "median"))
    share, beyond = rng.random(), rng.randrange(1, 5)
    pool = [rng.randint(low, high) for _ in range(draw.limit)]

    def build(half: int) -> Row:
        # An odd count, so that the median is one of the numbers.
        numbers = pool[: 2 * half + 1]
        at = int(share * len(numbers))
        depth: float | None = 100 * at / (len(numbers) - 1)
        if wanted == "median":
            answer, depth = sorted(numbers)[half], None
        else:
            # It occurs once: beyond all the others.
            answer = numbers[at] = high + beyond if wanted == "largest" else low - beyond
        return _row(str(numbers), f"Which is the {wanted} number of the list?", str(answer), depth)

    most = (draw.limit - 1) // 2
    return build(_most(draw, lambda half: draw.tokens(build(half)), least=2, most=most))


GENERATED: dict[str, Callable[[Draw], Row]] = {
    "passkey": make_passkey,
    "number_string": make_number_string,
    "kv_retrieval": make_kv_retrieval,
    "math_find": make_math_find,
}


def _in_noise(draw: Draw, hidden: str, answer: str, question: str) -> Row:
    share = draw.rng.random()

    def build(fragment: str, units: list[str]) -> Row:
        noise = [" ".join(fragment.split("\n")), *units] if fragment else units
        context = "\n".join(spread(noise, [hidden], [share]))
        return _row(context, question, answer, depths_of(context, [hidden])[0])

    parts = fit_units(
        [" ".join(NOISE)],
        lambda *parts: draw.tokens(build(*parts)),
        draw.limit,
        least=1,
        what=draw.what,
    )
    return build(*parts)


def _row(context: str, question: str, answer: str, depth: float | None) -> Row:
    return Row(
        input=question,
        context=context,
        answers=(answer,),
        length=0,
        others={"depth": None if depth is None else round(depth, 1)},
    )


def _most(draw: Draw, size: Callable[[int], int], *, least: int, most: int) -> int:
    count = largest_fit(size, draw.limit, least=least, most=most)
    if count is None:
        raise UserError(f"set {draw.what}: the length is too small for it")
    return count


def _identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
