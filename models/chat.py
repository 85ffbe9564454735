"""Chat templates: from messages to the text that an instruction-tuned model expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A Jinja template as checkpoints carry it, run in a sandbox; keeps its `source`.

    Args:
        source: the template's text.
        special_tokens: variables such as `bos_token` that templates expect.

    Raises:
        ValueError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        # Jinja's own filter escapes for HTML, which would change the prompt.
        environment.filters["tojson"] = _to_json
        self._special_tokens = dict(special_tokens)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as err:
            raise ValueError(f"chat template is not valid: {err}") from err

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes out a conversation.

        Args:
            messages: each with "role" and "content", in order.
            add_generation_prompt: end with the start of an answer of the model.
            **variables: whatever else this template knows, e.g. `enable_thinking`.

        Returns:
            The prompt, with its special tokens (and the BOS, where the model has one) as text.

        Raises:
            ValueError: the template refuses these messages; the message is the template's.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )
        except jinja2.TemplateError as err:
            raise ValueError(f"chat template: {err}") from err


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
