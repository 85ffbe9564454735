"""Standard errors and paired bootstrap intervals, against formulas, counting and SciPy."""

import math
import statistics

import numpy as np
import pytest
import scipy.stats

from experiments.core import uncertainty
from experiments.core.uncertainty import (
    FEWEST_ROWS,
    Average,
    paired_differences,
    standard_error,
    summarise,
)


def test_standard_error():
    assert standard_error([1.0]) is None
    # Sample variance of 0 and 2 is 2; sqrt(2 / 2) = 1.
    assert standard_error([0.0, 2.0]) == 1.0
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_summary_of_scores():
    scores = {"full": {"a": [0.0, 100.0, 50.0], "b": [100 / 3]}}
    result = summarise(scores, [Average("both", ("a", "b"))])
    assert result == {
        "score": {"full": {"a": 50.0, "b": 33.33}},
        "standard_error": {"full": {"a": 28.87, "b": None}},
        "n": {"full": {"a": 3, "b": 1}},
        "averages": {
            "both": {
                "sets": ["a", "b"],
                "score": {"full": 41.67},
                "standard_error": {"full": None},
            }
        },
        "paired": [],
    }


def test_sets_count_the_same_in_an_average_whatever_their_rows():
    scores = {"full": {"a": [0.0] * 8, "b": [100.0, 80.0]}}
    average = summarise(scores, [Average("x", ("a", "b"))])["averages"]["x"]
    assert average["score"]["full"] == 45.0
    # Errors 0 and 10 of independent means: sqrt(0 + 100) / 2.
    assert average["standard_error"]["full"] == 5.0


def pairs(scores, *averages):
    return {(p["policy"], p["against"]): p for p in paired_differences(scores, averages)}


def test_differences_are_later_minus_earlier_on_the_same_rows():
    # The policies differ by 10 on every row, however much the rows differ among themselves.
    base = [0.0, 90.0, 20.0, 70.0, 100.0]
    scores = {"x": {"a": base}, "y": {"a": [v + 10 for v in base]}, "z": {"a": base}}
    found = pairs(scores)
    assert list(found) == [("y", "x"), ("z", "x"), ("z", "y")]
    constant = {"difference": 10.0, "low": 10.0, "high": 10.0, "n": 5}
    assert found["y", "x"]["sets"]["a"] == constant
    assert found["z", "x"]["sets"]["a"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert found["z", "y"]["sets"]["a"]["difference"] == -10.0


def test_the_interval_is_the_percentile_bootstraps():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 100, (2, 40))
    (entry,) = paired_differences({"x": {"a": x.tolist()}, "y": {"a": y.tolist()}})
    found = entry["sets"]["a"]
    expected = scipy.stats.bootstrap(
        (y - x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found["difference"] == pytest.approx(statistics.fmean(y - x), abs=0.005)
    # Two sets of 10,000 and 20,000 draws: their tail quantiles differ by about 0.03 of the error.
    tolerance = 0.12 * standard_error((y - x).tolist())
    assert found["low"] == pytest.approx(expected.low, abs=tolerance)
    assert found["high"] == pytest.approx(expected.high, abs=tolerance)


def test_averages_draw_each_set_for_itself():
    # Differences of 0 and 100, half of each, in three sets of six rows.
    rows = {name: [0.0, 100.0] * 3 for name in "abc"}
    zero = {name: [0.0] * 6 for name in rows}
    found = pairs({"x": zero, "y": rows}, Average("m", tuple(rows)))["y", "x"]["averages"]["m"]
    assert (found["difference"], found["n"]) == (50.0, 18)
    # Means of a draw of 18 are those of 18 coins; drawn together they would be those of 6.
    low, high = (100 * scipy.stats.binom.ppf(q, 18, 0.5) / 18 for q in (0.025, 0.975))
    assert (found["low"], found["high"]) == (
        pytest.approx(low, abs=0.01),
        pytest.approx(high, abs=0.01),
    )
    assert 100 * scipy.stats.binom.ppf(0.025, 6, 0.5) / 6 < low - 5


def test_one_row_has_no_interval():
    scores = {"x": {"a": [1.0], "b": [1.0] * 9}, "y": {"a": [3.0], "b": [1.0] * 9}}
    pair = pairs(scores, Average("m", ("a", "b")))["y", "x"]
    assert pair["sets"]["a"] == {"difference": 2.0, "low": None, "high": None, "n": 1}
    assert pair["averages"]["m"]["low"] is None
    assert pair["averages"]["m"]["difference"] == 1.0


@pytest.mark.parametrize(("rows", "known"), [(FEWEST_ROWS - 1, False), (FEWEST_ROWS, True)])
def test_few_rows_have_no_interval(rows, known):
    # Two rows that happen to agree would make an interval without any width.
    scores = {"x": {"a": [0.0] * rows}, "y": {"a": [100.0] * rows}}
    entry = pairs(scores)["y", "x"]["sets"]["a"]
    assert (entry["low"] is not None) == known == (entry["high"] is not None)


def test_the_same_scores_give_the_same_intervals_in_any_company():
    rows = {"a": [0.0, 100.0, 0.0, 30.0, 9.0], "b": [10.0, 20.0, 30.0, 5.0, 1.0]}
    more = {"a": [50.0, 100.0, 20.0, 30.0, 0.0], "b": [0.0, 20.0, 60.0, 7.0, 2.0]}
    alone = pairs({"x": rows, "y": more})["y", "x"]
    assert pairs({"x": rows, "y": more})["y", "x"] == alone
    assert pairs({"w": more, "x": rows, "y": more})["y", "x"] == alone
    fewer = pairs({"x": {"b": rows["b"]}, "y": {"b": more["b"]}})["y", "x"]
    assert fewer["sets"]["b"] == alone["sets"]["b"]


@pytest.mark.parametrize("at_once", [1, 60, 10**9])
def test_the_same_rows_are_drawn_in_parts_of_any_size(monkeypatch, at_once):
    """How many are held at once, which bounds memory, changes no figure."""
    r = np.random.default_rng(0)
    scores = {policy: {"a": r.random(27).tolist(), "b": r.random(9).tolist()} for policy in "xy"}
    whole = summarise(scores, digits=9, aggregates={"b": statistics.median})
    monkeypatch.setattr(uncertainty, "_ROWS_AT_ONCE", at_once)
    assert summarise(scores, digits=9, aggregates={"b": statistics.median}) == whole


def test_rows_that_are_not_the_same_are_refused():
    with pytest.raises(ValueError, match=r"y has 1 rows of set a, x has 2"):
        paired_differences({"x": {"a": [1.0, 2.0]}, "y": {"a": [1.0]}})


def ratio(rows):
    """A figure of a whole set: no mean of anything that a row has."""
    return sum(a for a, _ in rows) / sum(b for _, b in rows)


def test_an_aggregate_has_the_bootstraps_error_and_paired_interval():
    rng = np.random.default_rng(0)
    bottom, top = rng.uniform(1, 9, 40), rng.uniform(0, 9, (2, 40))
    scores = {
        p: {"a": list(zip(own, bottom, strict=True))} for p, own in zip("xy", top, strict=True)
    }
    result = summarise(scores, digits=6, aggregates={"a": ratio})

    def statistic(x, y, b, axis=-1):
        return (y.sum(axis) - x.sum(axis)) / b.sum(axis)

    draws = {"n_resamples": 20_000, "method": "percentile", "paired": True}
    expected = scipy.stats.bootstrap(
        (*top, bottom), statistic, rng=np.random.default_rng(1), **draws
    )
    alone = scipy.stats.bootstrap(
        (np.zeros(40), top[0], bottom), statistic, rng=np.random.default_rng(2), **draws
    )
    assert result["score"]["x"]["a"] == pytest.approx(top[0].sum() / bottom.sum(), abs=1e-6)
    # 1,000 draws: their standard deviation is known to 1 / sqrt(2000) of it, one time in three.
    assert result["standard_error"]["x"]["a"] == pytest.approx(alone.standard_error, rel=0.1)
    found = result["paired"][0]["sets"]["a"]
    assert found["difference"] == pytest.approx((top[1] - top[0]).sum() / bottom.sum(), abs=2e-6)
    # The tail quantiles of 1,000 draws differ by about 0.08 of the error.
    tolerance = 0.3 * expected.standard_error
    assert found["low"] == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert found["high"] == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def test_an_aggregate_that_some_draws_do_not_have_has_no_error():
    rows = [1.0, *[None] * 5]
    scores = {p: {"a": rows, "b": rows[:1] * 6} for p in "xy"}
    result = summarise(scores, aggregates={"a": lambda rows: 1.0 if 1.0 in rows else math.nan})
    assert result["score"]["x"] == {"a": 1.0, "b": 1.0}
    assert result["standard_error"]["x"] == {"a": None, "b": 0.0}
    assert result["paired"][0]["sets"]["a"]["low"] is None
