"""Middle truncation of prompts, by tokens, as LongBench's own code does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def truncate_middle(
    text: str,
    max_length: int,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> str:
    """Cuts the middle out of a prompt that is too long.

    Both ends hold the instructions, so the first and the last `max_length // 2` tokens stay. They
    are decoded and joined as text: what is tokenised afterwards may differ from `max_length` by a
    few tokens, as it does in the official code.

    Args:
        text: the whole prompt.
        max_length: most tokens allowed, at least 2.
        encode: text to token ids, with the special tokens that the tokenizer adds by itself (they
            count towards the first half).
        decode: token ids to text, special tokens dropped.

    Returns:
        The text itself when it fits, else its two ends.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, not {max_length}")
    ids = encode(text)
    if len(ids) <= max_length:
        return text
    half = max_length // 2
    return decode(ids[:half]) + decode(ids[-half:])
