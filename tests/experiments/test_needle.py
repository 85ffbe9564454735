"""Needles: lengths, depths, determinism, a solver with the whole context, scores, a whole run."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from experiments.core.errors import UserError, run_main
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.rouge import rouge_1
from experiments.core.tasks import Measure
from experiments.core.texts import read_texts
from experiments.longbench.stdlib_text import prose_sentences
from experiments.needle.__main__ import main, read_haystack
from experiments.needle.cli import parse_depths
from experiments.needle.haystack import build_sets, cut_at
from experiments.needle.report import exact_score, grid, rouge_score
from tests.experiments.fakes import EOS, CharTokenizer
from tests.experiments.programs import assert_refused, interrupted_after
from tests.experiments.ruler_data import count_words

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
DEPTHS = (0.0, 30.0, 50.0, 100.0)
CHAT = Prompting(protocol="official", max_length=None, eos_ids=(EOS,))


def build(count, *, lengths=(1000, 3000), rows=2, seed=0, depths=DEPTHS):
    measure = Measure(lengths=lengths, rows=rows, seed=seed, chat=True, count=count)
    return build_sets(prose_sentences(), measure, depths=depths, source="here")


def count_characters(spec, row):
    return len(build_prompt(row, spec, CharTokenizer(), CHAT).ids)


@pytest.fixture(scope="module")
def sets():
    return build(count_characters)


def test_prompts_have_exactly_the_tokens_asked_for(sets):
    # A tokenizer of characters can fill any length; the chat template and the answer count.
    for task in sets:
        for row in task.rows:
            assert count_characters(task.spec, row) + 32 == row.length == int(task.spec.name)


def test_other_tokenizers_fall_short_by_less_than_a_sentence_piece():
    (task,) = build(count_words, lengths=(512,), rows=1)
    for row in task.rows:
        assert 512 - 2 <= count_words(task.spec, row) + 32 <= 512


def test_needles_stand_at_their_depths(sets):
    for task in sets:
        for row in task.rows:
            sentence = f"{row.answer_prefix} {row.answers[0]}."
            assert row.context.count(sentence) == 1
            before, after = row.context.split(sentence)
            measured = 100 * len(before) / (len(before) + len(after))
            assert row.others["at"] == pytest.approx(measured, abs=0.05)
            # Half a sentence of 40 words is the most that a border can be away.
            assert abs(measured - row.others["depth"]) <= 100 * 130 / len(before + after)
            if row.others["depth"] in (0.0, 100.0):
                assert measured == row.others["depth"]


def test_cells_differ_in_length_and_depth_alone(sets):
    for trial in range(2):
        rows = [row for task in sets for row in task.rows if row.others["trial"] == trial]
        assert len({row.input for row in rows}) == 1
        assert len({row.answers for row in rows}) == 1
        for task in sets:
            cells = [row for row in task.rows if row.others["trial"] == trial]
            hay = {
                re.sub(
                    r"\s+", "", row.context.replace(f"{row.answer_prefix} {row.answers[0]}.", "")
                )
                for row in cells
            }
            assert len(hay) == 1


def test_rows_depend_on_the_seed_and_nothing_else(sets):
    again = build(count_characters)
    assert [task.checksum for task in again] == [task.checksum for task in sets]
    alone = build(count_characters, lengths=(3000,), depths=(50.0,), rows=1)[0].rows[0]
    assert alone in sets[1].rows
    other = build(count_characters, seed=1)
    assert other[0].checksum != sets[0].checksum


def solve(prompt):
    """What a model that reads the whole prompt and copies can answer."""
    prefix = prompt.rpartition("bot: ")[2]
    return re.findall(re.escape(prefix) + r" ([^.]*)\.", prompt)[0]


def test_a_solver_with_the_whole_context_scores_100(sets):
    for task in sets:
        for row in task.rows:
            ids = build_prompt(row, task.spec, CharTokenizer(), CHAT).ids
            answer = " " + solve(CharTokenizer().decode(ids)) + ".\nMore text."
            assert exact_score(task.spec, answer, row.answers, None) == 100
            assert rouge_score(task.spec, answer, row.answers, None) == 100


@pytest.mark.parametrize(
    ("prediction", "exact", "rouge"),
    [
        ("under the Red bucket.", 100, 100),
        ("It is under a red, bucket here", 100, 100 * 2 * 3 / (7 + 4)),
        ("\n\nunder the red bucket\nno", 100, 100),
        ("no\nunder the red bucket", 0, 0),
        ("under the red buckets", 0, 100 * 2 * 3 / (4 + 4)),
        ("thunder the red bucket", 0, 100 * 2 * 3 / (4 + 4)),
        ("red red red", 0, 100 * 2 * 1 / (3 + 4)),
        ("", 0, 0),
    ],
)
def test_scores_by_hand(sets, prediction, exact, rouge):
    spec, answers = sets[0].spec, ("under the red bucket",)
    assert exact_score(spec, prediction, answers, None) == exact
    assert rouge_score(spec, prediction, answers, None) == pytest.approx(rouge, abs=1e-9)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(*[st.text(alphabet="ab1 .,Éß-\n", max_size=20)] * 2)
def test_rouge_1_is_that_of_the_rouge_score_package(a, b):
    expected = rouge_scorer.RougeScorer(["rouge1"]).score(b, a)["rouge1"].fmeasure
    assert rouge_1(a, b) == pytest.approx(expected, abs=1e-12)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text("x", min_size=1, max_size=9), min_size=1, max_size=9), st.floats(0, 1))
def test_cuts_are_the_closest_there_are(units, share):
    total = sum(map(len, units))
    gaps = [abs(sum(map(len, units[:i])) / total - share) for i in range(len(units) + 1)]
    assert gaps[cut_at(units, share)] == pytest.approx(min(gaps), abs=1e-9)


def test_grid_is_depth_by_length(sets):
    scores = {task.spec.name: [float(i) for i in range(len(task.rows))] for task in sets}
    values = grid(scores, sets, DEPTHS)
    np.testing.assert_array_equal(values, [[0.5, 0.5], [2.5, 2.5], [4.5, 4.5], [6.5, 6.5]])
    assert np.isnan(grid(scores, sets, (1.0,))).all()


def run(out, *extra):
    arguments = ["--model", MODEL, "--out", str(out), "--budget", "48", "--lengths", "256,384"]
    arguments += ["--depths", "0,100", "--rows", "1", "--policy", "full", "--policy", "streaming"]
    return run_main(lambda: main([*arguments, *extra]))


def test_a_run_leaves_cells_scores_and_maps_and_resumes(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == 0
    printed = capsys.readouterr().out
    assert "exact matches" in printed
    assert "ROUGE-1" in printed
    lines = (whole / "pred/streaming/384.jsonl").read_text().splitlines()
    assert [json.loads(line)["depth"] for line in lines] == [0.0, 100.0]
    content = json.loads((whole / "needle.json").read_text())
    assert content["lengths"] == ["256", "384"]
    assert content["depths"] == [0.0, 100.0]
    assert np.shape(content["rouge"]["full"]) == (2, 2)
    for name in ("exact-full", "exact-streaming", "rouge-full", "rouge-streaming"):
        head = (whole / f"{name}.png").read_bytes()[:24]
        assert min(struct.unpack(">II", head[16:])) > 100

    with interrupted_after(3):
        assert run(parts, "--no-plots") == 130
    assert run(parts, "--no-plots") == 0
    for name in ("needle.json", "result.json", "pred/full/384.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert not list(parts.glob("*.png"))
    assert run(whole, "--depths", "0,50") == 2
    assert "depths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--depths", "0,101"], "--depths 0,101"),
        (["--depths", "5,5.0"], "given twice"),
        (["--lengths", "128k"], "the model holds 40960"),
        (["--data", "/no/such"], "/no/such"),
        (["--policy", "h3o"], "h3o"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, culprit):
    code = run(tmp_path / "run", *extra)
    assert_refused(code, capsys.readouterr().err, culprit, tmp_path / "run")


def test_haystacks_from_files(tmp_path):
    (tmp_path / "b.txt").write_text("Second text. It goes on.")
    (tmp_path / "a.jsonl").write_text('{"text": "First one."}\n{"text": "First two."}\n')
    (tmp_path / "SOURCE.md").write_text("Not a text.")
    sentences, source = read_haystack(str(tmp_path))
    assert sentences == ("First one.", "First two.", "Second text.", "It goes on.")
    assert source == "a.jsonl, b.txt"
    assert [text.name for text in read_texts(str(tmp_path))] == ["a.jsonl:1", "a.jsonl:2", "b.txt"]
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"c\.txt: not UTF-8"):
        read_texts(str(tmp_path))
    (tmp_path / "c.txt").write_text(" ")
    with pytest.raises(UserError, match=r"c\.txt: holds no text"):
        read_texts(str(tmp_path))
    (tmp_path / "d.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"d\.jsonl, line 1: field 'text'"):
        read_texts(str(tmp_path / "d.jsonl"))


def test_depths():
    assert parse_depths("50, 0,12.5") == (0.0, 12.5, 50.0)
    for text in ("", "a", "nan", "-1", "1,1"):
        with pytest.raises(UserError, match="--depths"):
            parse_depths(text)
