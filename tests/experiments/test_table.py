"""Tables: cells, plain text that does not wrap, Markdown."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.core.environment import environment, git_commit, package_version
from experiments.core.table import (
    TextTable,
    cost_table,
    difference_table,
    human_bytes,
    markdown,
    policy_table,
    print_tables,
    read_markdown,
    score_table,
)

RESULT = {
    "score": {"full": {"a": 50.0, "b": 25.0}, "restkv": {"a": 40.0, "b": 5.5}},
    "standard_error": {"full": {"a": 1.25, "b": None}, "restkv": {"a": 2.0, "b": 0.0}},
    "n": {"full": {"a": 4, "b": 1}, "restkv": {"a": 4, "b": 1}},
    "averages": {
        "mean of sets": {
            "sets": ["a", "b"],
            "score": {"full": 37.5, "restkv": 22.75},
            "standard_error": {"full": None, "restkv": 1.5},
        }
    },
    "paired": [
        {
            "policy": "restkv",
            "against": "full",
            "sets": {
                "a": {"difference": -10.0, "low": -20.5, "high": 1.25, "n": 4},
                "b": {"difference": 0.0, "low": None, "high": None, "n": 1},
            },
            "averages": {"mean of sets": {"difference": 1.0, "low": 0.5, "high": 2.0, "n": 5}},
        }
    ],
}


def timing(prefill, decode, tokens):
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "new_tokens": tokens,
        "kept_slots": 128.0,
        "cache_bytes": 3 * 1024**2,
    }


def test_score_table():
    table = score_table("title", RESULT)
    assert table.columns == ("set", "n", "full", "restkv")
    assert table.rows == (
        ("a", "4", "50.00 ± 1.25", "40.00 ± 2.00"),
        ("b", "1", "25.00", "5.50 ± 0.00"),
        ("mean of sets", "", "37.50", "22.75 ± 1.50"),
    )


def test_many_policies_have_a_line_each():
    """The same cells: turned, not dropped."""
    rows = [("a", "4", *map(str, range(7))), ("b", "1", *map(str, range(10, 17)))]
    few = policy_table("t", ("set", "n"), "pqrstu", [row[:8] for row in rows])
    assert few.columns == ("set", "n", *"pqrstu")
    assert few.rows == tuple(row[:8] for row in rows)
    many = policy_table("t", ("set", "n"), "pqrstuv", rows)
    assert many.columns == ("policy", "a", "b")
    assert many.rows == (
        ("n", "4", "1"),
        *((name, str(i), str(10 + i)) for i, name in enumerate("pqrstuv")),
    )


def test_difference_table():
    table = difference_table(RESULT, "sets")
    assert table.columns == ("set", "policies", "n", "difference", "95 % interval")
    assert table.rows == (
        ("a", "restkv - full", "4", "-10.00", "-20.50 to +1.25"),
        ("b", "restkv - full", "1", "+0.00", "-"),
    )
    averages = difference_table(RESULT, "averages")
    assert averages.rows == (("mean of sets", "restkv - full", "5", "+1.00", "+0.50 to +2.00"),)
    assert difference_table({"paired": []}, "sets").rows == ()
    other = {**RESULT["paired"][0], "policy": "tova", "against": "restkv"}
    more = {"paired": [other, *RESULT["paired"]]}
    assert len(difference_table(more, "averages").rows) == 2
    to_full = difference_table(more, "averages", against="full")
    assert to_full.title == "paired differences, averages, to full"
    assert to_full.rows == averages.rows


def test_cost_table_takes_medians_of_times():
    entries = [timing(60.0, 60.0, 10), timing(1.0, 0.1, 10), timing(2.0, 0.2, 10)]
    table = cost_table({"full": entries, "none": [], "mute": [timing(1.0, 0.0, 0)]})
    assert table.rows[0] == ("full", "128.0", "3.0 MiB", "2.000", "20.00", "50.0")
    assert table.rows[1] == ("none", "-", "-", "-", "-", "-")
    assert table.rows[2][-2:] == ("0.00", "-")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (2**45, "32.0 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_plain_text_is_complete_however_wide():
    columns = ("set", *[f"policy-with-a-long-name-{i}" for i in range(12)])
    rows = tuple(("some set", *["[12.34] ± 1.00"] * 12) for _ in range(2))
    stream = io.StringIO()
    print_tables([TextTable("a title", columns, rows)], stream)
    text = stream.getvalue()
    assert "…" not in text
    assert "\x1b" not in text
    assert text.count("[12.34] ± 1.00") == 24
    assert all(column in text for column in columns)
    assert len([line for line in text.splitlines() if line.strip()]) == 4


def test_a_terminal_gets_the_same_cells():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    print_tables([score_table("title", RESULT)], stream)
    assert "mean of sets" in stream.getvalue()


def test_markdown():
    text = markdown([TextTable("t", ("a", "b"), (("x|y", "1"),))])
    assert text.splitlines() == ["**t**", "", "| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


_TEXT = st.text("ab|* é", max_size=6).map(str.strip)
_TABLES = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        TextTable,
        st.just("t é"),
        st.tuples(*[_TEXT] * n),
        st.lists(st.tuples(*[_TEXT] * n)).map(tuple),
    )
)


@settings(derandomize=True, deadline=None)
@given(st.lists(_TABLES, min_size=1, max_size=3))
def test_what_markdown_writes_is_read_back(tables):
    assert read_markdown(markdown(tables)) == tables


@pytest.mark.parametrize("text", ["", "no table", "**t**\n\n| a | b |\n| --- | ---: |\n| 1 |\n"])
def test_other_markdown_is_refused(text):
    with pytest.raises(ValueError, match="expected tables"):
        read_markdown(text)


def test_environment_is_plain_json():
    import json

    facts = json.loads(json.dumps(environment()))
    assert facts["packages"]["jax"]
    assert facts["device"]["count"] >= 1
    assert package_version("no-such-package") is None
    assert git_commit() is None or len(git_commit().removesuffix("-dirty")) == 40
