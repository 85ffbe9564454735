"""Writes a sentencepiece model file, which is a protocol buffer of few fields."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Values of a piece's type.
UNKNOWN, USER_DEFINED = 2, 4
_BYTE = 6

_BPE = 2  # of `TrainerSpec.model_type`
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types


def encode_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    add_dummy_prefix: bool,
) -> bytes:
    """A byte-pair model whose text keeps every space; with byte fallback if it has byte pieces.

    Args:
        pieces: the vocabulary by id, spaces as U+2581.
        scores: of each piece; the pair of the highest score is merged first.
        kinds: sentencepiece's type of each piece: 1 normal, 2 unknown, 3 control, 4 user-defined,
            5 unused, 6 a byte.
        add_dummy_prefix: text gets a space in front.

    Returns:
        The serialised `ModelProto`.
    """
    content = bytearray()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        # SentencePiece: piece, score, type.
        content += _message(
            1,
            _message(1, piece.encode())
            + _tag(2, _FLOAT)
            + struct.pack("<f", score)
            + _number(3, kind),
        )
    # TrainerSpec: model_type, byte_fallback, unk_id.
    byte_fallback = int(_BYTE in kinds)
    content += _message(
        2, _number(3, _BPE) + _number(35, byte_fallback) + _number(40, list(kinds).index(UNKNOWN))
    )
    # NormalizerSpec: name, add_dummy_prefix, remove_extra_whitespaces.
    prefix = int(add_dummy_prefix)
    content += _message(3, _message(1, b"identity") + _number(3, prefix) + _number(4, 0))
    return bytes(content)


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, _BYTES) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
