"""InfiniteBench: metrics by hand, generated rows and their solver, rows from files, a whole run."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import Measure
from experiments.infinitebench.__main__ import main
from experiments.infinitebench.data import load_sets, parse_row
from experiments.infinitebench.metrics import METRICS, score_prediction
from experiments.infinitebench.synthetic import GENERATED, build_sets
from experiments.infinitebench.tasks import TASKS, make_spec
from tests.experiments.fakes import EOS, CharTokenizer
from tests.experiments.programs import assert_refused

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
PROMPTING = Prompting(protocol="official", max_length=None, eos_ids=(EOS,))


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("first_integer", " 12345.", ["12345"], 1),
        ("first_integer", "It is 7, not 12345", ["12345"], 0),
        ("first_integer", "012345", ["12345"], 0),  # digit by digit
        ("first_integer", "none", ["12345"], 0),
        ("contains_word", '"a-1": "b-2"}', ["b-2"], 1),
        ("contains_word", "b-22", ["b-2"], 0),
        ("contains_name", "it is harry.", ["HARRY"], 1),
        ("contains_name", "it is harry's", ["HARRY"], 1),  # the apostrophe separates
        ("first_number", "is 90, or 91", ["90"], 1),
        ("first_number", "is 90.0", ["90"], 1),
        ("first_number", "is 90.5", ["90"], 0),
        ("first_number", "is 9 0", ["90"], 0),
        ("running_results", "[1, 3, 2, 4]", ["1", "3", "9", "4"], 0.5),
        ("running_results", "1 3", ["1", "3", "9", "4"], 0.5),
        ("running_results", "2 1 3", ["1", "3"], 0),
        ("last_integer", "The value is: -12.", ["-12"], 1),
        ("last_integer", "12 or so", ["12"], 0),
        ("last_integer", "", ["12"], 0),
        ("debug_choice", "B. run", ["run", "B"], 1),
        ("debug_choice", "I think the answer is: run", ["run", "B"], 1),
        ("debug_choice", "the answer is: Option B", ["run", "B"], 1),
        ("debug_choice", "B", ["run", "B"], 0),
        ("debug_choice", "It is:", ["run", "B"], 0),
        ("letter_choice", "C) because", ["C"], 1),
        ("letter_choice", "So the answer is C", ["C"], 1),
        ("letter_choice", "So the answer is D or C", ["C"], 0),
        ("letter_choice", "I take C over D", ["C"], 1),
        ("letter_choice", "", ["C"], 0),
        ("word_f1", "the cat sat", ["cat", "a dog"], 2 * 1 / (2 + 1)),
        ("character_f1", "张三。", ["张 三", "李四"], 1),
        ("character_f1", "张四", ["张三"], 0.5),
        ("summary_rouge", "a b\nc d", ["a b c d"], 1),
        ("summary_rouge", "a x", ["a b c"], 2 * 1 / (2 + 3)),
        ("summary_rouge", "", ["a"], 0),
    ],
)
def test_metrics_by_hand(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        # What the question asks for: the prompt ends with "The answer is:".
        (" B", 100),
        ("B", 100),
        (" B.", 100),
        ("\n**B**", 100),
        (" Option B: run", 100),
        (" run", 100),
        (" `run`", 100),
        (" C", 0),
        (" C. The answer is: B", 0),
        (" stop", 0),
        ("", 0),
    ],
)
def test_an_answer_goes_on_where_the_prompt_of_code_debug_ends(prediction, score):
    spec = make_spec("code_debug", "code_debug", chat=True)
    assert score_prediction(spec, prediction, ("run", "B"), None) == score


def test_the_beginning_of_an_answer_is_scored_with_no_other_task():
    spec = make_spec("longbook_choice_eng", "longbook_choice_eng", chat=True)
    assert score_prediction(spec, " option C", ("C",), None) == 100
    spec = make_spec("longbook_qa_chn", "longbook_qa_chn", chat=True)
    assert score_prediction(spec, "张三", ("张三",), None) == 100


def test_every_metric_is_some_tasks():
    assert {task.metric for task in TASKS.values()} == set(METRICS)
    assert len(TASKS) == 12


def count_characters(spec, row):
    return len(build_prompt(row, spec, CharTokenizer(), PROMPTING).ids)


def build(count=count_characters, lengths=(2000, 5000), rows=3, seed=0):
    measure = Measure(lengths=lengths, rows=rows, seed=seed, chat=True, count=count)
    return build_sets(tuple(GENERATED), measure)


@pytest.fixture(scope="module")
def sets():
    return build()


def test_rows_are_as_long_as_can_be(sets):
    # In characters: a text fills any length, a pair of identifiers is 80 long, a number 4.
    shortfall = {"passkey": 0, "number_string": 0, "kv_retrieval": 81, "math_find": 8}
    for task in sets:
        length, name = task.spec.name.split("/")
        for row in task.rows:
            assert row.length == count_characters(task.spec, row) + task.spec.max_new_tokens
            assert int(length) - shortfall[name] <= row.length <= int(length)


def solve(name, prompt):
    """What a model that reads the whole prompt can answer."""
    if name == "passkey":
        return re.findall(r"pass key is (\d{5})\.", prompt)[0]
    if name == "number_string":
        return re.findall(r"row of digits is (\d{10})\.", prompt)[0]
    if name == "kv_retrieval":
        data = json.loads(re.findall(r"\{.*\}", prompt)[0])
        return data[re.findall(r'the key "([^"]*)"', prompt)[0]]
    numbers = json.loads(re.findall(r"\[.*\]", prompt)[0])
    wanted = re.findall(r"Which is the (\w+) number", prompt)[0]
    return str({"largest": max, "smallest": min, "median": statistics.median}[wanted](numbers))


def test_a_solver_with_the_whole_context_scores_100(sets):
    for task in sets:
        name = task.spec.name.split("/")[1]
        for row in task.rows:
            ids = build_prompt(row, task.spec, CharTokenizer(), PROMPTING).ids
            prompt = CharTokenizer().decode(ids)
            assert prompt.endswith(TASKS[name].prefix)
            answer = f" {solve(name, prompt)}."
            assert score_prediction(task.spec, answer, row.answers, None) == 100
            assert score_prediction(task.spec, " 4 9", row.answers, None) == 0


def test_needles_lie_where_the_rows_say_and_occur_once(sets):
    for task in sets:
        name = task.spec.name.split("/")[1]
        for row in task.rows:
            if row.others["depth"] is None:
                assert "median" in row.input
                continue
            assert 0 <= row.others["depth"] <= 100
            if name == "math_find":
                numbers = json.loads(row.context)
                at = numbers.index(int(row.answers[0]))
                assert numbers.count(int(row.answers[0])) == 1
                assert 100 * at / (len(numbers) - 1) == pytest.approx(row.others["depth"], abs=0.05)
            else:
                assert row.answers[0] in row.context


def test_rows_depend_on_the_seed_and_nothing_else(sets):
    assert [task.checksum for task in build()] == [task.checksum for task in sets]
    measure = Measure(lengths=(5000,), rows=1, seed=0, chat=True, count=count_characters)
    (alone,) = build_sets(("math_find",), measure)
    assert alone.rows[0] in next(t for t in sets if t.spec.name == "5000/math_find").rows
    assert build(seed=1)[0].checksum != sets[0].checksum


def test_other_tokenizers_get_their_own_lengths():
    def count_words(spec, row):
        return count_characters(spec, row) // 4

    for task in build(count_words, lengths=(600,), rows=1):
        assert 600 - 21 <= task.rows[0].length <= 600


RECORD = {"id": 3, "context": "A text.", "input": "Who?", "answer": ["X"], "options": []}


@pytest.mark.parametrize(
    ("name", "changes", "asked", "answers"),
    [
        ("longbook_qa_eng", {"answer": ["X", "Y"]}, "Who?", ("X", "Y")),
        (
            "longbook_choice_eng",
            {"answer": ["r"], "options": ["p", "q", "r", "s"]},
            "Who?\nA. p\nB. q\nC. r\nD. s\n\nAnswer with a letter.",
            ("C",),
        ),
        (
            "code_debug",
            {"answer": "q", "options": ["p", "q", "r", "s"]},
            "A. p\nB. q\nC. r\nD. s\n\nWhich function has the error? Answer with a letter.",
            ("q", "B"),
        ),
        (
            "math_find",
            {"input": "Answer with one number. The second largest number is:", "answer": [9]},
            "Which is the second largest number of the list?",
            ("9",),
        ),
        ("math_calc", {"answer": [1, -2, 3]}, "Who?", ("1", "-2", "3")),
    ],
)
def test_rows_of_the_benchmark(name, changes, asked, answers):
    row = parse_row(name, {**RECORD, **changes})
    assert (row.input, row.answers, row.row_id) == (asked, answers, "3")
    assert row.answer_prefix == TASKS[name].prefix


@pytest.mark.parametrize(
    ("name", "record", "culprit"),
    [
        ("passkey", [], "not a JSON object"),
        ("passkey", {**RECORD, "context": " "}, "'context'"),
        ("passkey", {**RECORD, "input": None}, "'input'"),
        ("passkey", {**RECORD, "answer": []}, "'answer'"),
        ("longbook_choice_eng", RECORD, "'options' must hold 4"),
        ("longbook_choice_eng", {**RECORD, "options": list("pqrs")}, "none of the options"),
        ("math_find", RECORD, "names no number"),
        ("code_run", RECORD, "invalid literal"),
    ],
)
def test_broken_rows_are_named(name, record, culprit):
    with pytest.raises(ValueError, match=culprit):
        parse_row(name, record)


def test_folders(tmp_path):
    (tmp_path / "longbook_qa_eng.jsonl").write_text(json.dumps(RECORD) + "\n")
    options = {"limit": None, "chat": True}
    (task,) = load_sets(list(TASKS), str(tmp_path), explicit=False, **options)
    assert task.spec == make_spec("longbook_qa_eng", "longbook_qa_eng", chat=True)
    with pytest.raises(UserError, match=r"no file passkey\.jsonl"):
        load_sets(["passkey"], str(tmp_path), explicit=True, **options)
    (tmp_path / "passkey.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1: field 'context'"):
        load_sets(["passkey"], str(tmp_path), explicit=True, **options)


def run(out, *extra):
    arguments = ["--model", MODEL, "--out", str(out), "--budget", "48", "--policy", "streaming"]
    return run_main(lambda: main([*arguments, "--policy", "full", *extra]))


def test_a_run_of_generated_tasks_and_of_rows(tmp_path, capsys):
    out = tmp_path / "generated"
    extra = ["--tasks", "passkey,math_find", "--lengths", "384", "--rows", "1"]
    assert run(out, *extra) == 0
    assert "384: mean of these 2 tasks" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["n"]["full"] == {"384/passkey": 1, "384/math_find": 1}
    (tmp_path / "longbook_qa_eng.jsonl").write_text(
        json.dumps({**RECORD, "context": "A long text. " * 200}) + "\n"
    )
    out = tmp_path / "rows"
    assert run(out, "--data", str(tmp_path), "--max-length", "100", "--template", "none") == 0
    (line,) = (out / "timing/full/longbook_qa_eng.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt_tokens"] <= 104
    assert "its rows" in (out / "table.md").read_text()


def test_rows_and_their_answers_fit_into_the_model(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    record = {**RECORD, "context": "A long text. " * 500}
    for name in ("longbook_qa_eng", "longbook_sum_eng"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    options = ["--model", str(model), "--data", str(tmp_path)]
    out = tmp_path / "run"
    assert run(out, *options, "--tasks", "longbook_qa_eng") == 0
    meta = json.loads((out / "run_meta.json").read_text())
    (line,) = (out / "timing/full/longbook_qa_eng.jsonl").read_text().splitlines()
    answer = TASKS["longbook_qa_eng"].max_new_tokens
    assert meta["config"]["max_length"] == 512 - answer - 256
    assert 512 - answer - 256 < json.loads(line)["prompt_tokens"] <= 512 - answer
    # 1,200 tokens of a summary leave nothing.
    capsys.readouterr()
    code = run(tmp_path / "none", *options)
    assert_refused(code, capsys.readouterr().err, "no room for a prompt", tmp_path / "none")


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--tasks", "longbook_qa_eng"], "needs its rows"),
        (["--tasks", "nope"], "unknown task 'nope'"),
        (["--lengths", "128k"], "the model holds 40960"),
        (["--data", "/no/such"], "/no/such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, culprit):
    code = run(tmp_path / "run", *extra)
    assert_refused(code, capsys.readouterr().err, culprit, tmp_path / "run")
