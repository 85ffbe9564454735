"""Text of ids that arrive one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from models.tokenizer_backends import Backend

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What the bytes of a character that is not whole yet are decoded to, at most.
_MOST_HELD = 3
# Ids decoded again with each new one: from _KEPT up to _WINDOW, however long the text is.
_KEPT, _WINDOW = 16, 64


class TextStream:
    """Decodes ids as they come, in pieces that end between characters.

    The pieces together are what `decode` gives for all ids at once: nothing is emitted that an
    id to come could change. The bytes of half a character are held back, and so is text that
    ends in U+FFFD, until more follows or the stream ends.

    Args:
        backend: does the decoding.
        skip_special: leave special tokens out, rather than write their names.
    """

    def __init__(self, backend: Backend, *, skip_special: bool) -> None:
        self._backend = backend
        self._skip_special = skip_special
        self._ids: list[int] = []  # the newest, and some before them
        self._emitted = 0  # characters of their text

    def push(self, ids: Iterable[int]) -> str:
        """Takes in more ids.

        Returns:
            The text that is settled by now and was not before; often "".
        """
        self._ids += map(int, ids)
        open_ids = self._backend.unsettled(self._ids, skip_special=self._skip_special)
        text = self._decode(self._ids[: len(self._ids) - open_ids])
        settled = len(text)
        while settled and len(text) - settled < _MOST_HELD and text[settled - 1] == _REPLACEMENT:
            settled -= 1
        piece = text[self._emitted : settled]
        self._emitted = max(self._emitted, settled)
        if not open_ids and settled == len(text):
            self._forget()
        return piece

    def finish(self) -> str:
        """The rest, when no more ids will come; the stream is empty again afterwards."""
        rest = self._decode(self._ids)[self._emitted :]
        self._ids, self._emitted = [], 0
        return rest

    def _forget(self) -> None:
        """Drops ids whose text is out. Some stay as context: the first of a text is special."""
        if len(self._ids) > _WINDOW:
            context = self._decode(self._ids[-_KEPT:])
            if context:
                del self._ids[:-_KEPT]
                self._emitted = len(context)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special=self._skip_special)
