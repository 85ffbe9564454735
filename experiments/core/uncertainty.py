"""How sure a score is: standard errors, and paired differences with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# policy -> set -> score of each row, 0 to 100; row i of a set is the same row for all policies.
Scores = Mapping[str, Mapping[str, Sequence[float]]]

RESAMPLES = 10_000
# Two-sided 95 %.
_QUANTILES = (0.025, 0.975)
# With fewer rows in a set there is no interval: draws of so few tell next to nothing.
FEWEST_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Average:
    """A mean over sets, each set counting the same whatever its number of rows.

    Attributes:
        name: what is averaged, in the words of the tables.
        sets: names of the sets.
    """

    name: str
    sets: tuple[str, ...]


def summarise(scores: Scores, averages: Sequence[Average] = (), digits: int = 2) -> dict[str, Any]:
    """All that `result.json` says of the scores.

    Args:
        scores: the rows' scores.
        averages: means over sets that are wanted.
        digits: decimals of what is returned.

    Returns:
        "score", "standard_error" and "n": policy -> set -> number; "averages": name -> its sets,
        and policy -> number for score and standard error; "paired": for each two policies, the
        later one minus the earlier one, by set and by average (see `paired_differences`). Scores
        have `digits` decimals; a standard error is null where a set has one row.
    """
    return {
        "score": {
            policy: {name: round(statistics.fmean(rows), digits) for name, rows in sets.items()}
            for policy, sets in scores.items()
        },
        "standard_error": {
            policy: {name: _rounded(standard_error(rows), digits) for name, rows in sets.items()}
            for policy, sets in scores.items()
        },
        "n": {
            policy: {name: len(rows) for name, rows in sets.items()}
            for policy, sets in scores.items()
        },
        "averages": {
            average.name: {
                "sets": list(average.sets),
                "score": {
                    policy: round(
                        statistics.fmean(statistics.fmean(sets[name]) for name in average.sets),
                        digits,
                    )
                    for policy, sets in scores.items()
                },
                "standard_error": {
                    policy: _rounded(average_error([sets[name] for name in average.sets]), digits)
                    for policy, sets in scores.items()
                },
            }
            for average in averages
        },
        "paired": paired_differences(scores, averages, digits),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation over sqrt(n); None below two values."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def average_error(sets: Sequence[Sequence[float]]) -> float | None:
    """Standard error of a mean over sets whose rows are independent; None where one set has none.

    Args:
        sets: the rows' scores of each set, which counts the same whatever its number of rows.
    """
    errors = [standard_error(rows) for rows in sets]
    if None in errors:
        return None
    return math.hypot(*(error for error in errors if error is not None)) / len(errors)


def paired_differences(
    scores: Scores, averages: Sequence[Average] = (), digits: int = 2
) -> list[dict[str, Any]]:
    """Differences between policies on the same rows.

    The interval is the percentile bootstrap's, at 95 %: rows are drawn with replacement, the same
    rows for both policies, within each set for itself; an average is taken anew from each draw.
    It tells of other rows of the same kind, not of other models, and is too narrow where rows are
    few.

    Args:
        scores: the rows' scores.
        averages: means over sets that are wanted.
        digits: decimals of what is returned.

    Returns:
        For each two policies in their order: "policy" (the later one), "against", and "sets" and
        "averages": name -> "difference", "low" and "high" (null where a set has fewer than
        `FEWEST_ROWS` rows), "n".

    Raises:
        ValueError: if two policies have not answered the same number of rows of a set.
    """
    policies = list(scores)
    sets = list(scores[policies[0]]) if policies else []
    for policy, name in itertools.product(policies, sets):
        rows, expected = len(scores[policy][name]), len(scores[policies[0]][name])
        if rows != expected:
            raise ValueError(
                f"scores: {policy} has {rows} rows of set {name}, {policies[0]} has {expected}"
            )
    drawn = {
        name: _drawn_means([scores[policy][name] for policy in policies], name) for name in sets
    }
    of_sets = {name: (name,) for name in sets}
    of_averages = {average.name: average.sets for average in averages}
    result = []
    for (i, against), (j, policy) in itertools.combinations(enumerate(policies), 2):
        entry: dict[str, Any] = {"policy": policy, "against": against}
        for kind, groups in (("sets", of_sets), ("averages", of_averages)):
            entry[kind] = {
                label: _difference(
                    [scores[policy][name] for name in names],
                    [scores[against][name] for name in names],
                    np.mean([drawn[name][j] - drawn[name][i] for name in names], axis=0),
                    digits,
                )
                for label, names in groups.items()
            }
        result.append(entry)
    return result


def _difference(
    later: Sequence[Sequence[float]],
    earlier: Sequence[Sequence[float]],
    drawn: np.ndarray,
    digits: int,
) -> dict[str, Any]:
    """The difference of two policies' means over sets, and where the drawn ones [R] lie."""
    exact = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(later, earlier, strict=True)]
    counts = [len(rows) for rows in later]
    enough = min(counts) >= FEWEST_ROWS
    low, high = np.quantile(drawn, _QUANTILES) if enough else (None, None)
    return {
        "difference": _rounded(statistics.fmean(exact), digits),
        "low": _rounded(low, digits),
        "high": _rounded(high, digits),
        "n": sum(counts),
    }


def _drawn_means(rows: Sequence[Sequence[float]], seed: str) -> np.ndarray:
    """Means [P, R] of P policies' scores [P, n] over R draws of n rows, shared by the policies."""
    values = np.asarray(rows, np.float64)
    n = values.shape[1]
    chosen = np.random.default_rng(zlib.crc32(seed.encode())).integers(0, n, (RESAMPLES, n))
    return np.stack([row[chosen].mean(axis=1) for row in values])


def _rounded(value: float | None, digits: int) -> float | None:
    # Adding 0 makes a negative zero positive.
    return None if value is None else round(float(value), digits) + 0.0
