"""Fitting texts to a length: the searches, whatever the sizes look like."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.core.errors import UserError
from experiments.core.fitting import fit_units, largest_fit, last_good, tail


def test_tail_starts_over():
    assert tail("abc", 2) == ["b", "c"]
    assert tail("abc", 5) == ["b", "c", "a", "b", "c"]


@pytest.mark.parametrize("limit", range(10))
def test_last_good(limit):
    assert last_good(lambda n: n <= limit, 0, 10) == limit


def test_fit_units_uses_the_end_of_the_unit_before():
    pool = ["aaaa", "bbbb", "cccc", "dddd"]
    fragment, units = fit_units(pool, lambda f, u: len(f) + sum(map(len, u)), 10, least=1, what="x")
    assert (fragment, units) == ("bb", ["cccc", "dddd"])


def test_fit_units_needs_its_least():
    with pytest.raises(UserError, match="set x: 3 tokens are too few"):
        fit_units(["aaaa"], lambda f, u: len(f) + sum(map(len, u)), 3, least=1, what="x")


@settings(derandomize=True, deadline=None)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    limit=st.integers(0, 900),
    least=st.integers(0, 5),
)
def test_largest_fit_is_the_largest(steps, limit, least):
    sizes = [sum(steps[:n]) for n in range(len(steps) + 1)]
    least = min(least, len(steps))
    fitting = [n for n in range(least, len(sizes)) if sizes[n] <= limit]
    found = largest_fit(sizes.__getitem__, limit, least=least, most=len(steps))
    assert found == (fitting[-1] if fitting else None)


def test_largest_fit_without_an_upper_end():
    assert largest_fit(lambda n: 3 * n, 100) == 33
    assert largest_fit(lambda n: n * n, 10**6) == 1000


def test_largest_fit_of_wavering_sizes_fits():
    def size(n):
        return 10 * n + 7 * math.sin(n)

    found = largest_fit(size, 5000)
    assert size(found) <= 5000 < size(found + 1)


def test_largest_fit_looks_at_few_sizes_of_a_text():
    looked = []

    def size(n):
        looked.append(n)
        return 60 + 26 * n + n % 3

    assert largest_fit(size, 131_072) == 5038
    assert len(looked) <= 8
