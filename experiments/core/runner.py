"""The evaluation loop: rows to prompts, prompts to answers of every policy, answers to files.

The engine that runs the model is handed in, so this file knows nothing of JAX.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from experiments.core.errors import UserError
from experiments.core.progress import RunProgress
from experiments.core.results import ResultStore
from experiments.core.tasks import Row, SetSpec, TaskSet, fill_prompt
from experiments.core.truncate import truncate_middle

ProtocolName = Literal["official", "released"]

# (set, prediction, answers, classes) -> 0 to 100.
Score = Callable[[SetSpec, str, Sequence[str], Sequence[str] | None], float]


class Tokenizer(Protocol):
    """What the loop asks of a tokenizer."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat` works."""
        ...

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Text to ids; `add_bos=None` does what the model wants."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids to text."""
        ...

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The chat template's text, including the special tokens that it writes."""
        ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one policy made of a prompt.

    Attributes:
        token_ids: the generated tokens, the one that stopped them included.
        prefill_s: seconds for the prompt; the shared prefill counts for every policy.
        decode_s: seconds for the generation.
        kept_slots: filled slots after the prefill, mean over layers and heads.
        cache_bytes: bytes that the policy's cache occupies.
    """

    token_ids: list[int]
    prefill_s: float
    decode_s: float
    kept_slots: float
    cache_bytes: int


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompting:
    """How rows become prompts.

    Attributes:
        protocol: "official" truncates, then applies the chat template except for the sets that
            are exempt, and stops at any of the model's end tokens. "released" is what the
            published ReST-KV scripts do: no template but `[INST] .. [/INST]` for Llama-2 style
            models, put around before truncation and for every set; only the end-of-sequence
            token stops, and never as the first token.
        max_length: longest prompt in tokens before the chat template; longer ones lose their
            middle. None leaves prompts as they are.
        eos_ids: the end-of-sequence token.
        turn_end_ids: tokens that end a chat turn.
        inst_style: the model is of the Llama-2 chat style; used by "released" only.
        query_agnostic: contexts are compressed before the question is seen.
    """

    protocol: ProtocolName
    max_length: int | None
    eos_ids: tuple[int, ...]
    turn_end_ids: tuple[int, ...] = ()
    inst_style: bool = False
    query_agnostic: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        ids: its tokens, the same whether the question is set apart or not.
        stop_ids: tokens that end the generation.
        min_new_tokens: tokens to generate before they count.
        context_tokens: how many first tokens would be the same without the question; None if
            that is of no interest.
    """

    ids: list[int]
    stop_ids: tuple[int, ...]
    min_new_tokens: int
    context_tokens: int | None = None


def build_prompt(row: Row, spec: SetSpec, tokenizer: Tokenizer, prompting: Prompting) -> Prompt:
    """Fills, truncates, wraps and tokenises a row's prompt.

    Raises:
        UserError: if nothing is left to ask, or truncation met the question that is to be set
            apart.
    """
    text, question = fill_prompt(spec.prompt, row), fill_prompt(spec.question, row)
    released = prompting.protocol == "released"
    if released and prompting.inst_style:
        text, question = f"[INST] {text} [/INST]", f"{question} [/INST]"
    if prompting.max_length is not None:
        text = truncate_middle(text, prompting.max_length, tokenizer.encode, tokenizer.decode)

    def encode(text: str, prefix: str) -> list[int]:
        if not released and spec.chat and tokenizer.has_chat_template:
            # The template writes the beginning-of-sequence token itself where one is wanted.
            chat = tokenizer.apply_chat([{"role": "user", "content": text}])
            return tokenizer.encode(chat + prefix, add_bos=False)
        return tokenizer.encode(f"{text}\n{prefix}" if prefix else text)

    ids = encode(text, row.answer_prefix)
    if not ids:
        raise UserError(f"set {spec.name}: a row makes an empty prompt")
    context_tokens = None
    if prompting.query_agnostic:
        if not text.endswith(question):
            raise UserError(f"set {spec.name}: truncation cuts a question; it must stay whole")
        # Tokens that are the same with and without a question say nothing of it.
        context_tokens = _shared(ids, encode(text[: len(text) - len(question)], ""))
        if not context_tokens:
            raise UserError(f"set {spec.name}: a row's context and question share their tokens")
    if released:
        return Prompt(ids, prompting.eos_ids, 1, context_tokens)
    stop_ids = {*prompting.eos_ids, *prompting.turn_end_ids}
    if spec.stop_at_newline:
        stop_ids.add(tokenizer.encode("\n", add_bos=False)[-1])
    least = 1 if spec.stop_at_newline else 0
    return Prompt(ids, tuple(sorted(stop_ids)), least, context_tokens)


def row_seed(seed: int, set_name: str, index: int) -> int:
    """A seed of its own for each row, so that a resumed run samples what it would have."""
    return zlib.crc32(f"{seed}/{set_name}/{index}".encode())


def evaluate(
    sets: Sequence[TaskSet],
    policies: Sequence[str],
    *,
    engine: Engine,
    tokenizer: Tokenizer,
    prompting: Prompting,
    store: ResultStore,
    progress: RunProgress,
    seed: int,
) -> None:
    """Answers every row that is not stored yet, one prefill for all policies of a row.

    Every answer is on disk before the next row is begun, so a run can be stopped at any time and
    goes on at the next row.

    Args:
        sets: the sets, in order.
        policies: labels of the policies.
        engine: runs the model.
        tokenizer: the model's.
        prompting: how rows become prompts.
        store: where answers go.
        progress: is told of each row.
        seed: base of the rows' seeds.

    Raises:
        UserError: if an answer cannot be stored.
    """
    # All counts before the first row: a folder that does not fit is refused before any work.
    counts = {
        (task.spec.name, policy): store.done(policy, task.spec.name, task.rows)
        for task in sets
        for policy in policies
    }
    for task in sets:
        spec = task.spec
        first = min(counts[spec.name, policy] for policy in policies)
        progress.start_set(spec.name, len(task.rows), first)
        for index in range(first, len(task.rows)):
            # A kill between two policies of one row leaves only some of them to be asked.
            todo = [policy for policy in policies if counts[spec.name, policy] <= index]
            prompt = build_prompt(task.rows[index], spec, tokenizer, prompting)
            answers = engine.answer(
                prompt.ids,
                policies=todo,
                max_new_tokens=spec.max_new_tokens,
                stop_ids=prompt.stop_ids,
                seed=row_seed(seed, spec.name, index),
                min_new_tokens=prompt.min_new_tokens,
                context_tokens=prompt.context_tokens,
            )
            for policy in todo:
                answer = answers[policy]
                text = tokenizer.decode(answer.token_ids)
                timing = _timing(answer, len(prompt.ids))
                store.append(policy, spec.name, task.rows[index], text, timing)
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


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two sequences have in common."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def _timing(answer: Answer, prompt_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "prefill_s": answer.prefill_s,
        "decode_s": answer.decode_s,
        "kept_slots": answer.kept_slots,
        "cache_bytes": answer.cache_bytes,
    }
