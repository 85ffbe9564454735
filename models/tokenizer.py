"""One tokenizer interface over the formats that checkpoints come with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.chat import ChatTemplate
from models.streaming import TextStream
from models.tokenizer_backends import Backend

# How the chat formats of the supported models end a turn.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back, and chats to text.

    Attributes:
        backend: does the work.
        bos_id: begin-of-text, or None where the model has none.
        eos_ids: end-of-text; empty if the files do not say.
        pad_id: padding, or None.
        add_bos: `encode` puts `bos_id` first unless told otherwise.
        chat: the chat template, or None.
    """

    backend: Backend
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    add_bos: bool = False
    chat: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's embedding may have more rows."""
        return self.backend.vocab_size

    @property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a chat turn, as far as the vocabulary has them."""
        ids = (self.backend.token_id(token) for token in _TURN_ENDS)
        return tuple(token_id for token_id in ids if token_id is not None)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat` works."""
        return self.chat is not None

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Turns text into ids.

        Args:
            text: any string. Give what `apply_chat` returns with `add_bos=False`: the template
                has written the BOS already.
            add_bos: put `bos_id` first; None does as the model was trained. Without effect
                where the model has no BOS.
            parse_special: read strings such as "<|im_end|>" as the token. Say False for text
                from a source that must not be able to end a turn.

        Returns:
            The ids; never with an end-of-text appended.
        """
        wants_bos = self.add_bos if add_bos is None else add_bos
        prefix = [self.bos_id] if wants_bos and self.bos_id is not None else []
        return prefix + self.backend.encode(text, parse_special=parse_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turns ids into text.

        Args:
            ids: token ids.
            skip_special: leave special tokens out, rather than write their names.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Decodes ids that come one after the other; see `TextStream`.

        Args:
            skip_special: as of `decode`, to which the pieces add up.
        """
        return TextStream(self.backend, skip_special=skip_special)

    def save(self, folder: Path) -> None:
        """Writes the files that `models.huggingface.read_tokenizer` reads."""
        ids = {"bos": self.bos_id, "eos": next(iter(self.eos_ids), None), "pad": self.pad_id}
        config: dict[str, Any] = {
            f"{name}_token": self.backend.decode([token_id], skip_special=False)
            for name, token_id in ids.items()
            if token_id is not None
        }
        config["add_bos_token"] = self.add_bos
        if self.chat is not None:
            config["chat_template"] = self.chat.source
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        self.backend.save(folder)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Writes a conversation in the model's chat format; see `ChatTemplate.render`.

        Args:
            messages: each with "role" and "content", in order.
            add_generation_prompt: end with the start of an answer of the model.
            **kwargs: further variables of the template.

        Returns:
            The prompt.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat is None:
            raise ValueError("this model has no chat template")
        return self.chat.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
