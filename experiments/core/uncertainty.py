"""How sure a score is: standard errors, and paired differences with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# policy -> set -> score of each row, 0 to 100; row i of a set is the same row for all policies.
Scores = Mapping[str, Mapping[str, Sequence[float]]]

# What the rows of a set come to where that is not their mean; the rows may then be of any type.
Aggregate = Callable[[Sequence[Any]], float]

RESAMPLES = 10_000
# Of sets with an `Aggregate`, which runs once a draw and is Python.
AGGREGATE_RESAMPLES = 1_000
# That are drawn and held, of all policies the same.
_ROWS_AT_ONCE = 2**22
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


def summarise(
    scores: Scores,
    averages: Sequence[Average] = (),
    digits: int = 2,
    aggregates: Mapping[str, Aggregate] | None = None,
) -> dict[str, Any]:
    """All that `result.json` says of the scores.

    Args:
        scores: the rows' scores.
        averages: means over sets that are wanted, either all with an aggregate or none.
        digits: decimals of what is returned.
        aggregates: set -> what its rows come to; of other sets the mean is taken.

    Returns:
        "score", "standard_error" and "n": policy -> set -> number; "averages": name -> its sets,
        and policy -> number for score and standard error; "paired": for each two policies, the
        later one minus the earlier one, by set and by average (see `paired_differences`). Scores
        have `digits` decimals; a standard error is null where a set has one row. That of an
        aggregate is the bootstrap's, the standard deviation over draws of the rows, and null where
        the aggregate of a draw is not finite.
    """
    aggregates = aggregates or {}
    values, drawn = _values(scores, aggregates), _drawn(scores, aggregates)
    errors = {
        policy: {
            name: _drawn_error(drawn[name][p], len(rows))
            if name in aggregates
            else standard_error(rows)
            for name, rows in sets.items()
        }
        for p, (policy, sets) in enumerate(scores.items())
    }
    return {
        "score": {
            policy: {name: round(value, digits) for name, value in sets.items()}
            for policy, sets in values.items()
        },
        "standard_error": {
            policy: {name: _rounded(error, digits) for name, error in sets.items()}
            for policy, sets in errors.items()
        },
        "n": {
            policy: {name: len(rows) for name, rows in sets.items()}
            for policy, sets in scores.items()
        },
        "averages": {
            average.name: {
                "sets": list(average.sets),
                "score": {
                    policy: round(statistics.fmean(sets[name] for name in average.sets), digits)
                    for policy, sets in values.items()
                },
                "standard_error": {
                    policy: _rounded(average_error([sets[name] for name in average.sets]), digits)
                    for policy, sets in errors.items()
                },
            }
            for average in averages
        },
        "paired": _paired(scores, averages, digits, values, drawn),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation over sqrt(n); None below two values."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def average_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean of independent sets, which count alike whatever their rows.

    Args:
        errors: those of the sets; where one has none, the mean has none.
    """
    if None in errors:
        return None
    return math.hypot(*(error for error in errors if error is not None)) / len(errors)


def paired_differences(
    scores: Scores,
    averages: Sequence[Average] = (),
    digits: int = 2,
    aggregates: Mapping[str, Aggregate] | None = None,
) -> list[dict[str, Any]]:
    """Differences between policies on the same rows.

    The interval is the percentile bootstrap's, at 95 %: rows are drawn with replacement, the same
    rows for both policies, within each set for itself; an average is taken anew from each draw.
    It tells of other rows of the same kind, not of other models, and is too narrow where rows are
    few.

    Args:
        scores: the rows' scores.
        averages: means over sets that are wanted, either all with an aggregate or none.
        digits: decimals of what is returned.
        aggregates: set -> what its rows come to; of other sets the mean is taken.

    Returns:
        For each two policies in their order: "policy" (the later one), "against", and "sets" and
        "averages": name -> "difference", "low" and "high" (null where a set has fewer than
        `FEWEST_ROWS` rows), "n".

    Raises:
        ValueError: if two policies have not answered the same number of rows of a set.
    """
    aggregates = aggregates or {}
    values, drawn = _values(scores, aggregates), _drawn(scores, aggregates)
    return _paired(scores, averages, digits, values, drawn)


def _paired(
    scores: Scores,
    averages: Sequence[Average],
    digits: int,
    values: Mapping[str, Mapping[str, float]],
    drawn: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    sets = {name: len(rows) for name, rows in next(iter(scores.values()), {}).items()}
    kinds: dict[str, dict[str, tuple[str, ...]]] = {
        "sets": {name: (name,) for name in sets},
        "averages": {average.name: average.sets for average in averages},
    }
    result = []
    for (i, against), (j, policy) in itertools.combinations(enumerate(scores), 2):
        entry: dict[str, Any] = {"policy": policy, "against": against}
        for kind, groups in kinds.items():
            entry[kind] = {
                label: _difference(
                    [values[policy][name] - values[against][name] for name in names],
                    [sets[name] for name in names],
                    [drawn[name][j] - drawn[name][i] for name in names],
                    digits,
                )
                for label, names in groups.items()
            }
        result.append(entry)
    return result


def _difference(
    exact: Sequence[float], counts: Sequence[int], drawn: Sequence[np.ndarray], digits: int
) -> dict[str, Any]:
    """The mean over sets of two policies' differences, and where that of the drawn ones lies."""
    enough = min(counts) >= FEWEST_ROWS
    low, high = np.quantile(np.mean(drawn, axis=0), _QUANTILES) if enough else (None, None)
    return {
        "difference": _rounded(statistics.fmean(exact), digits),
        "low": _rounded(low, digits),
        "high": _rounded(high, digits),
        "n": sum(counts),
    }


def _values(scores: Scores, aggregates: Mapping[str, Aggregate]) -> dict[str, dict[str, float]]:
    return {
        policy: {name: aggregates.get(name, statistics.fmean)(rows) for name, rows in sets.items()}
        for policy, sets in scores.items()
    }


def _drawn(scores: Scores, aggregates: Mapping[str, Aggregate]) -> dict[str, np.ndarray]:
    """Set -> what P policies' rows come to [P, R] in R draws, shared by the policies."""
    policies = list(scores)
    sets = list(scores[policies[0]]) if policies else []
    for policy, name in itertools.product(policies, sets):
        rows, expected = len(scores[policy][name]), len(scores[policies[0]][name])
        if rows != expected:
            raise ValueError(
                f"scores: {policy} has {rows} rows of set {name}, {policies[0]} has {expected}"
            )
    return {
        name: _drawn_set([scores[policy][name] for policy in policies], name, aggregates.get(name))
        for name in sets
    }


def _drawn_set(rows: Sequence[Sequence[Any]], seed: str, aggregate: Aggregate | None) -> np.ndarray:
    n, draws = len(rows[0]), AGGREGATE_RESAMPLES if aggregate else RESAMPLES
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    numbers = [] if aggregate else [np.asarray(row, np.float64) for row in rows]
    parts = []
    # So many at a time that memory does not grow with the rows; they are the same in any parts.
    for first in range(0, draws, step := max(1, _ROWS_AT_ONCE // max(n, 1))):
        chosen = random.integers(0, n, (min(step, draws - first), n))
        if aggregate is None:
            parts.append([row[chosen].mean(axis=1) for row in numbers])
        else:
            parts.append([[aggregate([row[i] for i in draw]) for draw in chosen] for row in rows])
    return np.concatenate(parts, axis=1)


def _drawn_error(drawn: np.ndarray, rows: int) -> float | None:
    return None if rows < 2 else float(np.std(drawn, ddof=1))


def _rounded(value: float | None, digits: int) -> float | None:
    # Adding 0 makes a negative zero positive.
    return None if value is None or not math.isfinite(value) else round(float(value), digits) + 0.0
