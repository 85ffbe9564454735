"""Metrics: hand-computed cases, properties, and independent implementations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.core.tasks import SetSpec
from experiments.longbench import metrics
from experiments.longbench.sets import LONGBENCH_SETS

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a-b!", "cat ab"),
        ("An apple; the end.", "apple end"),
        ("theory of a", "theory of"),
        ("«quoted»", "«quoted»"),
    ],
)
def test_normalize_answer(text, expected):
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower", 1.0),
        ("the tower in Paris", "Eiffel Tower", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("no no no", "no", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("", "x", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_qa_f1(prediction, answer, expected):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # LCS "the cat sat" of 4 predicted and 3 expected words: P 3/4, R 1.
        ("the cat sat down", "the cat sat", 2 * 0.75 / 1.75),
        ("sat cat the", "the cat sat", 1 / 3),
        ("", "x", 0.0),
        ("x", "", 0.0),
        ("...", "x", 0.0),
        (" ", "x", 0.0),
    ],
)
def test_rouge_l(prediction, answer, expected):
    assert metrics.rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_agrees_with_rouge_score_on_one_sentence():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for prediction, answer in [
        ("one two three four", "one three five"),
        ("red fish blue fox", "blue fox red fish"),
    ]:
        expected = scorer.score(answer, prediction)["rougeL"].fmeasure
        assert metrics.rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-6)


CLASSES = ["entity", "other entity", "date"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("date", "date", 1.0),
        ("date or entity", "date", 0.5),
        ("other entity", "other entity", 1.0),
        ("other entity, a date", "other entity", 0.5),
        # The longer name is no part of the answer, so it counts against it.
        ("other entity", "entity", 0.5),
        ("Date", "date", 0.0),
        ("", "date", 0.0),
    ],
)
def test_classification(prediction, answer, expected):
    assert metrics.classification(prediction, answer, CLASSES) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("3", "3", 1.0), ("3 or 4", "3", 0.5), ("13", "3", 0.0), ("three", "3", 0.0), ("03", "3", 0)],
)
def test_count(prediction, answer, expected):
    assert metrics.count(prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Paragraph 7", "Paragraph 7", 1.0),
        ("7", "Paragraph 7", 1.0),
        ("Paragraph 7 of 30", "Paragraph 7", 0.5),
        ("Paragraph 17", "Paragraph 7", 0.0),
        ("none", "Paragraph 7", 0.0),
    ],
)
def test_retrieval(prediction, answer, expected):
    assert metrics.retrieval(prediction, answer) == expected


def test_retrieval_refuses_an_answer_without_a_paragraph():
    with pytest.raises(ValueError, match="names no paragraph"):
        metrics.retrieval("7", "the seventh")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return x", "return x", 1.0),
        ("\n\nreturn x\nmore", "return x", 1.0),
        ("# first\nreturn x", "return x", 1.0),
        ("// first\n```py\nreturn x", "return x", 1.0),
        # 6 letters match in 3 + 4: 2 * 3 / 7 = 0.857 -> 0.86.
        ("abc", "abcd", 0.86),
        ("# only a comment", "x", 0.0),
        # A line of blanks is the first line; one that follows a comment may be empty.
        ("   \nreturn x", "return x", 0.18),
        ("# c\n\nreturn x", "return x", 0.0),
    ],
)
def test_code_similarity(prediction, answer, expected):
    assert metrics.code_similarity(prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("amber falcon 482915.", "amber falcon 482915", 1.0),
        ("It is Amber Falcon, I think 482915", "amber falcon 482915", 1.0),
        ("falcon amber 482915", "amber falcon 482915", 2 / 3),
        ("amber falcon 482916", "amber falcon 482915", 2 / 3),
        ("", "amber", 0.0),
        ("x", "...", 0.0),
    ],
)
def test_words_in_order(prediction, answer, expected):
    assert metrics.words_in_order(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize("spec", LONGBENCH_SETS.values(), ids=lambda spec: spec.name)
@given(prediction=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3))
def test_scores_stay_within_0_and_100(spec, prediction, answers):
    if spec.metric == "retrieval":
        answers = [f"Paragraph {len(answer)}" for answer in answers]
    score = metrics.score_prediction(spec, prediction, answers, answers)
    assert 0 <= score <= 100


GOLD = {
    "qa_f1": "Orange blossom",
    "rouge_l": "They met. Then they left.",
    "classification": "date",
    "count": "12",
    "retrieval": "Paragraph 12",
    "code_similarity": "    return self.x",
}


@pytest.mark.parametrize("spec", LONGBENCH_SETS.values(), ids=lambda spec: spec.name)
def test_the_gold_answer_scores_100_and_the_best_answer_counts(spec):
    gold = GOLD[spec.metric]
    answers = [gold, gold.replace("12", "13")]
    assert metrics.score_prediction(spec, gold, answers, CLASSES) == pytest.approx(100, abs=1e-4)
    assert metrics.score_prediction(spec, gold, answers[::-1], CLASSES) == pytest.approx(
        100, abs=1e-4
    )


def test_only_the_first_line_counts_where_the_official_scorer_says_so():
    few_shot, other = LONGBENCH_SETS["triviaqa"], LONGBENCH_SETS["hotpotqa"]
    prediction = "\nOrange\nPassage: more"
    assert metrics.score_prediction(few_shot, prediction, ["Orange"], None) == 100
    assert metrics.score_prediction(other, prediction, ["Orange"], None) == 50
    # Leading newlines only are dropped: a line of blanks is a line.
    assert metrics.score_prediction(few_shot, " \nOrange", ["Orange"], None) == 0


def test_agrees_with_lm_eval_where_that_is_right():
    # It strips predictions and skips blank lines before code, neither of which matters here; its
    # module wants two packages that are not installed, so they are stood in for.
    import difflib
    import importlib
    import sys
    import types

    pytest.importorskip("lm_eval")
    fuzz = types.SimpleNamespace(
        ratio=lambda a, b: round(100 * difflib.SequenceMatcher(None, a, b).ratio())
    )
    stand_ins = {"jieba": types.ModuleType("jieba"), "fuzzywuzzy": types.ModuleType("fuzzywuzzy")}
    stand_ins["fuzzywuzzy"].fuzz = fuzz
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        theirs = importlib.import_module("lm_eval.tasks.longbench.metrics")
    for prediction, answer in [
        ("the red house by the sea", "a red house"),
        ("Paragraph 3, or 4", "Paragraph 3"),
        ("import os\nx = 1", "import sys"),
        ("# c\nreturn y", "return x"),
        ("He went. She did not.", "She went. He did not."),
    ]:
        assert metrics.qa_f1(prediction, answer) == theirs.qa_f1_score(prediction, answer)
        assert metrics.rouge_l(prediction, answer) == theirs.rouge_score(prediction, answer)
        assert metrics.code_similarity(prediction, answer) == theirs.code_sim_score(
            prediction, answer
        )
        assert metrics.count(prediction, "3") == theirs.count_score(prediction, "3")
        if answer.startswith("Paragraph"):
            assert metrics.retrieval(prediction, answer) == theirs.retrieval_score(
                prediction, answer
            )
    for prediction in ("date", "other entity", "date entity"):
        for answer in CLASSES:
            assert metrics.classification(
                prediction, answer, CLASSES
            ) == theirs.classification_score(prediction, answer, all_classes=CLASSES)


def test_no_answer_scores_0():
    spec = SetSpec(name="x", prompt="{context}", max_new_tokens=1, metric="qa_f1")
    assert metrics.score_prediction(spec, "x", [], None) == 0
