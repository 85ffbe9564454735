"""Cuts a text to a token length, whatever the tokenizer."""

from __future__ import annotations

import math
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
    separator: str = "\n",
) -> tuple[str, list[str]]:
    """As many last units of a pool as fit, and the end of what comes before them.

    Args:
        pool: sentences, lines or examples in reading order.
        tokens_of: token length of the whole prompt made from such an end and the whole units
            after it; grows with both.
        length: most tokens.
        least: units without which the prompt makes no sense.
        what: name of the set, for the message.
        separator: stands between two units.

    Returns:
        The end of the text before, possibly empty, and the whole units in reading order. The
        former is cut by characters, so that the prompt is as long as the tokenizer allows within
        `length`.

    Raises:
        UserError: if not even `least` units fit.
    """
    count = largest_fit(lambda count: tokens_of("", tail(pool, count)), length, least=least)
    if count is None:
        raise UserError(f"set {what}: {length} tokens are too few for it")
    whole = tail(pool, count)
    # Two units, because a whole one can bring more than its own text, such as a new heading.
    before = separator.join(tail(pool, count + 2)[:2])

    def end_fits(size: int) -> bool:
        return tokens_of(before[len(before) - size :], whole) <= length

    size = last_good(end_fits, 0, len(before))
    # Tokenisers are not quite monotone in the number of characters.
    while size and not end_fits(size):
        size -= 1
    return before[len(before) - size :], whole


def largest_fit(
    size: Callable[[int], float], limit: float, *, least: int = 0, most: int | None = None
) -> int | None:
    """The largest count whose size is within a limit.

    Sizes of prompts grow almost linearly with what is put into them, and counting the tokens of a
    long one takes long: the search interpolates, and bisects where that does not pay.

    Args:
        size: size of a count; grows with it, though token counts may waver by a few.
        limit: largest size allowed.
        least: smallest count.
        most: largest count; None if there is none.

    Returns:
        A count from `least` to `most` within the limit, such that the next one is not, or None
        if `least` is not. Its own size has been looked at, so it fits even where sizes waver.
    """
    low, low_size, slope = least, size(least), 0.0
    if low_size > limit:
        return None
    # A count that is known to be too large, and its size as far as it was looked at.
    above, above_size = (None, math.inf) if most is None else (most + 1, math.inf)
    trials = 0
    while above is None or above - low > 1:
        trials += 1
        if above is not None and above_size < math.inf:
            share = (limit - low_size) / (above_size - low_size)
            trial = low + int((share if trials % 4 else 0.5) * (above - low))
        elif slope > 0:
            # Not too far: small counts tell little of the slope at large ones.
            trial = min(low + int((limit - low_size) / slope) + 1, 10 * low + 8)
        else:
            trial = 2 * low + 8
        trial = max(trial, low + 1) if above is None else min(max(trial, low + 1), above - 1)
        found = size(trial)
        if found > limit:
            above, above_size = trial, found
        else:
            slope = (found - low_size) / (trial - low)
            low, low_size = trial, found
    return low


def last_good(good: Callable[[int], bool], low: int, high: int) -> int:
    """The last number in [low, high) that is good, `low` being so, by bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
