"""RULER's scores by hand, and against the harness's own functions where those are right."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.ruler.scoring import score_prediction, string_match_all, string_match_part
from experiments.ruler.tasks import TASKS, make_spec


def score(task, prediction, *answers):
    return score_prediction(make_spec(task, 4096, chat=False), prediction, answers, None)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" 1234567.", ["1234567"], 100),
        ("The number is 1234567", ["7654321"], 0),
        ("1, 2 and 4", ["1", "2", "3", "4"], 75),
        ("", ["1234567"], 0),
        # Upper and lower case are the same on both sides.
        ("abcde FGHIJ", ["ABCDE", "fghij", "KLMNO"], 200 / 3),
        # Parts of longer words count, as they do officially.
        ("12345678", ["1234567"], 100),
        ("carpet", ["car", "pet"], 100),
        # Order and repetition do not.
        ("b a b b", ["a", "b"], 100),
        ("x x", ["x", "y"], 50),
        # Two answers that are alike are two answers.
        ("x", ["x", "x", "y", "y"], 50),
    ],
)
def test_all_answers_count_by_their_share(prediction, answers, expected):
    assert score("niah_multivalue", prediction, *answers) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was in 1066.", ["1066", "in the year 1066"], 100),
        ("william farel", ["Calvin", "William Farel"], 100),
        ("Nobody", ["Calvin", "William Farel"], 0),
        ("", ["Calvin"], 0),
    ],
)
def test_any_answer_counts_in_full(prediction, answers, expected):
    assert score("qa_1", prediction, *answers) == score("qa_2", prediction, *answers) == expected


def test_control_characters_are_line_breaks_to_the_scorer():
    assert score("niah_single_1", "\x00 1234567\x07", "1234567") == 100
    assert score("niah_single_1", "123\x004567", "1234567") == 0
    assert score("qa_1", "a\tb", "a b") == 0
    assert score("qa_1", "a\tb", "a\nb") == 100


def test_every_task_has_its_metric():
    # One of two answers: half for those that want all, all for those that want any.
    assert {name: score(name, "yes", "yes", "no") for name in TASKS} == {
        name: 100 if name in ("qa_1", "qa_2") else 50 for name in TASKS
    }


def harness():
    """The functions of the installed harness; its module cannot be imported without a network."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm_eval is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "tasks/ruler/common_utils.py"
    tree = ast.parse(path.read_text())
    names = ("postprocess_pred", "string_match_all", "string_match_part")
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(functions) == 3
    scope = {"re": re}
    exec(compile(ast.Module(functions, []), str(path), "exec"), scope)
    return scope


TEXT = st.text(alphabet="aAbB1 \n\x00\t", max_size=12)


@settings(derandomize=True, deadline=None)
@given(prediction=TEXT, answers=st.lists(TEXT.filter(bool), min_size=1, max_size=4))
def test_agrees_with_the_harness(prediction, answers):
    theirs = harness()
    cleaned = theirs["postprocess_pred"]([prediction])
    expected = 100 * theirs["string_match_all"](cleaned, [answers])
    assert score("vt", prediction, *answers) == pytest.approx(expected, abs=1e-9)
    # Its any-of score is the official one with a single answer only.
    one = 100 * theirs["string_match_part"](cleaned, [answers[:1]])
    assert score("qa_1", prediction, answers[0]) == one


def test_the_harness_divides_where_the_official_scorer_does_not():
    answers = ["1066", "in 1066 AD"]
    assert harness()["string_match_part"](["It was 1066"], [answers]) == 0.5
    assert string_match_part("It was 1066", answers) == 1.0
    assert string_match_all("It was 1066", answers) == 0.5
