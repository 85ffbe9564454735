"""The evaluation loop: rows to what every policy makes of them, and that to files.

What asks a row is handed in, so this file knows nothing of JAX. Most benchmarks generate an answer
(`generating`); others measure something else of a row, such as the likelihood of its text.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from experiments.core.progress import RunProgress
from experiments.core.prompts import Prompting, Tokenizer, build_prompt
from experiments.core.results import ResultStore
from experiments.core.tasks import Row, SetSpec, TaskSet

# (set, prediction, answers, classes) -> 0 to 100, unless the benchmark's title says otherwise.
Score = Callable[[SetSpec, Any, Sequence[str], Sequence[str] | None], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one policy's answer cost.

    Attributes:
        prompt_tokens: tokens of the prompt.
        context_tokens: first ones of these that the cache was compressed from: all of them, or
            those before the question.
        new_tokens: tokens that followed it, generated or given.
        prefill_s: seconds for the prompt; the shared prefill counts for every policy.
        decode_s: seconds for the tokens that followed.
        kept_slots: filled slots after the prefill, mean over layers and heads.
        cache_bytes: bytes that the policy's cache occupies.
        decoded_with: caches that were decoded at once, and that `decode_s` was shared out to.
    """

    prompt_tokens: int
    context_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    kept_slots: float
    cache_bytes: int
    decoded_with: int = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is stored of one policy and row.

    Attributes:
        prediction: the answer's text, or whatever else was measured, as plain JSON values.
        cost: what it cost.
    """

    prediction: Any
    cost: Cost


# (set, row, its number, policies) -> an outcome for each of the policies, whose order is no matter.
Ask = Callable[[SetSpec, Row, int, Sequence[str]], Mapping[str, Outcome]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one policy made of a prompt.

    Attributes:
        token_ids: the generated tokens, the one that stopped them included.
        prefill_s: seconds for the prompt; the shared prefill counts for every policy.
        decode_s: seconds for the generation; its share where several caches are decoded at once.
        kept_slots: filled slots after the prefill, mean over layers and heads.
        cache_bytes: bytes that the policy's cache occupies.
        decoded_with: caches that were decoded at once.
    """

    token_ids: list[int]
    prefill_s: float
    decode_s: float
    kept_slots: float
    cache_bytes: int
    decoded_with: int = 1


class Engine(Protocol):
    """Runs the model: one prefill, then the generation of each policy asked for."""

    def answer(
        self,
        prompt_ids: list[int],
        *,
        policies: Sequence[str],
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        seed: int,
        min_new_tokens: int = 0,
        context_tokens: int | None = None,
    ) -> Mapping[str, Answer]:
        """Answers one prompt.

        Args:
            prompt_ids: the prompt.
            policies: labels of the policies that must answer; their order does not matter.
            max_new_tokens: most tokens to generate.
            stop_ids: tokens that end the generation.
            seed: of sampling, if there is any.
            min_new_tokens: tokens to generate before a stop token counts.
            context_tokens: compress the cache of this many first tokens, then feed the rest;
                None compresses with the whole prompt in sight.

        Returns:
            An answer for each label in `policies`.
        """
        ...


def row_seed(seed: int, set_name: str, index: int) -> int:
    """A seed of its own for each row, so that a resumed run samples what it would have."""
    return zlib.crc32(f"{seed}/{set_name}/{index}".encode())


def generating(engine: Engine, tokenizer: Tokenizer, prompting: Prompting, seed: int) -> Ask:
    """Asks rows by letting the model answer them, one prefill for all policies of a row.

    Args:
        engine: runs the model.
        tokenizer: the model's.
        prompting: how rows become prompts.
        seed: base of the rows' seeds.
    """

    def ask(spec: SetSpec, row: Row, index: int, policies: Sequence[str]) -> dict[str, Outcome]:
        prompt = build_prompt(row, spec, tokenizer, prompting)
        answers = engine.answer(
            prompt.ids,
            policies=policies,
            max_new_tokens=spec.max_new_tokens,
            stop_ids=prompt.stop_ids,
            seed=row_seed(seed, spec.name, index),
            min_new_tokens=prompt.min_new_tokens,
            context_tokens=prompt.context_tokens,
        )
        return {
            policy: Outcome(
                tokenizer.decode(answer.token_ids),
                Cost(
                    prompt_tokens=len(prompt.ids),
                    context_tokens=len(prompt.ids[: prompt.context_tokens]),
                    new_tokens=len(answer.token_ids),
                    prefill_s=answer.prefill_s,
                    decode_s=answer.decode_s,
                    kept_slots=answer.kept_slots,
                    cache_bytes=answer.cache_bytes,
                    decoded_with=answer.decoded_with,
                ),
            )
            for policy, answer in answers.items()
        }

    return ask


def evaluate(
    sets: Sequence[TaskSet],
    cohorts: Sequence[Sequence[str]],
    *,
    ask: Ask,
    store: ResultStore,
    progress: RunProgress,
) -> None:
    """Asks every row that is not stored yet, once for all policies of a cohort.

    One cohort is asked after the other. Every answer is on disk before the next row is begun, so a
    run can be stopped at any time and goes on at the next row.

    Args:
        sets: the sets, in order.
        cohorts: labels of the policies, those together that are asked together.
        ask: asks one row.
        store: where answers go.
        progress: is told of each row.

    Raises:
        UserError: if an answer cannot be stored.
    """
    # All counts before the first row: a folder that does not fit is refused before any work.
    counts = {
        (task.spec.name, policy): store.done(policy, task.spec.name, task.rows)
        for task in sets
        for policies in cohorts
        for policy in policies
    }
    for task in sets:
        spec = task.spec
        firsts = [min(counts[spec.name, policy] for policy in policies) for policies in cohorts]
        progress.start_set(spec.name, len(task.rows), firsts)
        # All rows of a cohort before the next: its programs may be as many as a process can hold.
        for policies, first in zip(cohorts, firsts, strict=True):
            for index in range(first, len(task.rows)):
                row = task.rows[index]
                # All of the cohort, even where a kill between two of them left only some: together
                # they are the same program as before, and round alike.
                found = ask(spec, row, index, policies)
                for policy in policies:
                    if counts[spec.name, policy] <= index:
                        cost = dataclasses.asdict(found[policy].cost)
                        store.append(policy, spec.name, row, found[policy].prediction, cost)
                progress.row_done()
        progress.end_set()


def score_run(
    sets: Sequence[TaskSet],
    policies: Sequence[str],
    store: ResultStore,
    score: Score,
) -> dict[str, dict[str, list[float]]]:
    """Scores a finished run from its files.

    Args:
        sets: the sets.
        policies: labels of the policies.
        store: where the answers are.
        score: scores one prediction.

    Returns:
        policy -> set -> score of each row.
    """
    return {
        policy: {
            task.spec.name: [
                score(task.spec, stored["pred"], row.answers, row.all_classes)
                for row, stored in zip(
                    task.rows, store.predictions(policy, task.spec.name), strict=True
                )
            ]
            for task in sets
        }
        for policy in policies
    }
