"""From rows to prompts: templates filled, middles cut, chat templates applied, tokens counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from experiments.core.errors import UserError
from experiments.core.tasks import Row, SetSpec, fill_prompt
from experiments.core.truncate import truncate_middle

ProtocolName = Literal["official", "released"]


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
        return tokenizer.encode(f"{text}{spec.delimiter}{prefix}" if prefix else text)

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


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two sequences have in common."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))
