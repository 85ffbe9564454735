"""Cuts a text to a token length, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiments.core.errors import UserError


def tail(pool: Sequence[str], count: int) -> list[str]:
    """The last `count` units of a pool, which starts over where it is too short."""
    return [pool[-1 - i % len(pool)] for i in reversed(range(count))]


def fit_units(
    pool: Sequence[str],
    tokens_of: Callable[[str, list[str]], int],
    length: int,
    *,
    least: int,
    what: str,
) -> tuple[str, list[str]]:
    """As many last units of a pool as fit, and the end of what comes before them.

    Args:
        pool: sentences, lines or examples in reading order.
        tokens_of: token length of the whole prompt made from such an end and the whole units
            after it; grows with both.
        length: most tokens.
        least: units without which the prompt makes no sense.
        what: name of the set, for the message.

    Returns:
        The end of the text before, possibly empty, and the whole units in reading order. The
        former is cut by characters, so that the prompt is as long as the tokenizer allows within
        `length`.

    Raises:
        UserError: if not even `least` units fit.
    """

    def fits(count: int) -> bool:
        return tokens_of("", tail(pool, count)) <= length

    if not fits(least):
        raise UserError(f"set {what}: {length} tokens are too few for it")
    high = 2 * least
    while fits(high):
        high *= 2
    count = last_good(fits, least, high)
    whole = tail(pool, count)
    # Two units, because a whole one can bring more than its own text, such as a new heading.
    before = "\n".join(tail(pool, count + 2)[:2])

    def end_fits(size: int) -> bool:
        return tokens_of(before[len(before) - size :], whole) <= length

    size = last_good(end_fits, 0, len(before))
    # Tokenisers are not quite monotone in the number of characters.
    while size and not end_fits(size):
        size -= 1
    return before[len(before) - size :], whole


def last_good(good: Callable[[int], bool], low: int, high: int) -> int:
    """The last number in [low, high) that is good, `low` being so, by bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
