"""The tokenisation algorithms behind `models.tokenizer.Tokenizer`."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import sentencepiece
import tokenizers

from models.errors import CheckpointError

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Backend(Protocol):
    """A tokenisation algorithm with its vocabulary; adds no tokens of its own accord."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of the text; special strings in it become their ids if `parse_special`."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of the ids, leaving special ones out if `skip_special`."""
        ...

    def unsettled(self, ids: Sequence[int], *, skip_special: bool) -> int:
        """How many of the last ids have a text that ids to come may change.

        Beside up to three U+FFFD at the end, which may become a character.
        """
        ...

    def token_id(self, token: str) -> int | None:
        """Id of one token given by name, or None."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the file that it can be read from again, if it has one."""
        ...


class TokenizersBackend:
    """A pipeline of the `tokenizers` library, such as a `tokenizer.json`.

    Args:
        pipeline: the library's object; not changed.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer) -> None:
        self._pipeline = pipeline

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._pipeline.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """See `Backend`."""
        pipeline = self._pipeline if parse_special else self._literal
        return pipeline.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend`."""
        return self._pipeline.decode(ids, skip_special_tokens=skip_special)

    def unsettled(self, ids: Sequence[int], *, skip_special: bool) -> int:
        """See `Backend`: bytes that follow each other are text or not as one."""
        if not self._falls_back_to_bytes:
            return 0
        last = len(ids)
        while last and (
            _BYTE_TOKEN.fullmatch(self._pipeline.id_to_token(ids[last - 1]) or "")
            or (skip_special and ids[last - 1] in self._special_ids)
        ):
            last -= 1
        return len(ids) - last

    def token_id(self, token: str) -> int | None:
        """See `Backend`."""
        return self._pipeline.token_to_id(token)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`."""
        self._pipeline.save(str(folder / "tokenizer.json"))

    def prefix(self) -> list[int]:
        """The ids that the pipeline itself puts around an empty text."""
        return self._pipeline.encode("", add_special_tokens=True).ids

    @functools.cached_property
    def _falls_back_to_bytes(self) -> bool:
        """Whether tokens such as <0x0A> are decoded to bytes."""
        return b'"ByteFallback"' in pickle.dumps(self._pipeline.decoder)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._pipeline.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that takes special strings as plain text: the choice is state, not argument."""
        literal = copy.deepcopy(self._pipeline)
        literal.encode_special_tokens = True
        return literal


class SentencePieceBackend:
    """A `tokenizer.model`, with special tokens split off before it sees the text.

    Args:
        proto: content of the model file.
        origin: the file, for error messages.
        added: special string -> id; None takes the control pieces of the file.
        skipped: ids that `decode(skip_special=True)` leaves out; None for all of `added`.
        prefix_everywhere: whether text after a special token gets the dummy prefix too, as
            text at the very start does.

    Raises:
        CheckpointError: `proto` is not a sentencepiece model.
    """

    # A ModelProto that holds only `normalizer_spec { add_dummy_prefix: false }`. Protocol
    # buffers merge when concatenated, so appending it switches the prefix off.
    _NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(
        self,
        proto: bytes,
        *,
        origin: Path,
        added: Mapping[str, int] | None,
        skipped: frozenset[int] | None = None,
        prefix_everywhere: bool,
    ) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            inner = self._model
            if not prefix_everywhere:
                inner = sentencepiece.SentencePieceProcessor(model_proto=proto + self._NO_PREFIX)
        except RuntimeError as err:
            raise CheckpointError(f"{origin}: not a sentencepiece model ({err})") from err
        self._inner = inner
        self._proto = proto
        if added is None:
            added = {
                self._model.id_to_piece(i): i
                for i in range(self._model.vocab_size())
                if self._model.is_control(i) or self._model.is_unknown(i)
            }
        self._added = dict(added)
        self._names = {token_id: token for token, token_id in self._added.items()}
        self._skipped = frozenset(self._names) if skipped is None else skipped
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max([self._model.vocab_size() - 1, *self._names]) + 1

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """See `Backend`."""
        if not (parse_special and self._added):
            return self._model.encode(text)
        ids: list[int] = []
        for number, piece in enumerate(self._splitter.split(text)):
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                ids += (self._inner if number else self._model).encode(piece)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend`."""
        if skip_special:
            return self._model.decode([i for i in ids if i not in self._skipped])
        text = ""
        plain: list[int] = []
        for token_id in ids:
            if token_id in self._names:
                text += self._model.decode(plain) + self._names[token_id]
                plain = []
            else:
                plain.append(token_id)
        return text + self._model.decode(plain)

    def unsettled(self, ids: Sequence[int], *, skip_special: bool) -> int:  # noqa: ARG002
        """See `Backend`: each byte is decoded as soon as its character ends."""
        return 0

    def token_id(self, token: str) -> int | None:
        """See `Backend`."""
        if token in self._added:
            return self._added[token]
        token_id = self._model.piece_to_id(token)
        return None if self._model.is_unknown(token_id) else token_id

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model`."""
        (folder / "tokenizer.model").write_bytes(self._proto)


class MissingBackend:
    """Stands in where a checkpoint has no tokenizer: the model runs, on ids only.

    Args:
        folder: the checkpoint, for the error message.
    """

    vocab_size = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, text: str, *, parse_special: bool) -> list[int]:  # noqa: ARG002
        """Raises CheckpointError."""
        self._fail()

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:  # noqa: ARG002
        """Raises CheckpointError."""
        self._fail()

    def unsettled(self, ids: Sequence[int], *, skip_special: bool) -> int:  # noqa: ARG002
        """None: there is no text."""
        return 0

    def token_id(self, token: str) -> int | None:  # noqa: ARG002
        """None: there are no tokens."""
        return None

    def save(self, folder: Path) -> None:
        """Writes nothing: there is nothing."""

    def _fail(self) -> NoReturn:
        raise CheckpointError(f"{self._folder}: no tokenizer.json and no tokenizer.model")
