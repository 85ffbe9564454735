"""Filling and cutting prompts."""

import pytest

from experiments.core.tasks import Row, SetSpec, fill_prompt, rows_checksum
from experiments.core.truncate import truncate_middle

ROW = Row(input="q", context="c", answers=("a",), length=1)


def encode(text):
    return [ord(c) for c in text]


def decode(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abef"),
        ("abcdef", 4, "abef"),
        ("abcdef", 3, "af"),
        ("abcdef", 2, "af"),
        ("", 2, ""),
    ],
)
def test_truncate_middle(text, limit, expected):
    assert truncate_middle(text, limit, encode, decode) == expected


def test_the_bos_token_counts_towards_the_first_half():
    assert (
        truncate_middle(
            "abcdef", 4, lambda t: [0, *encode(t)], lambda ids: decode(i for i in ids if i)
        )
        == "aef"
    )


def test_truncate_needs_two_tokens():
    with pytest.raises(ValueError, match="at least 2"):
        truncate_middle("abc", 1, encode, decode)


def test_braces_in_texts_and_prompts_stay():
    row = Row(input="{context}", context="{input} {x}", answers=("a",), length=1)
    assert fill_prompt("{context}|{input}|{y}{}", row) == "{input} {x}|{context}|{y}{}"


def test_a_prompt_without_context_is_refused():
    with pytest.raises(ValueError, match="'x' has no"):
        SetSpec(name="x", prompt="{input}", max_new_tokens=1, metric="qa_f1")


def test_checksum_sees_every_row_and_their_order():
    other = Row(input="q", context="c", answers=("b",), length=1)
    sums = {rows_checksum(rows) for rows in ([], [ROW], [other], [ROW, other], [other, ROW])}
    assert len(sums) == 5
