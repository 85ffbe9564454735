"""`--prompts official`: the wordings are lm_eval's to the letter, the rest is as ever."""

import dataclasses
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from experiments.core.errors import UserError
from experiments.core.harness import read_task, task_folder
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import Measure, fill_prompt
from experiments.ruler import __main__ as program
from experiments.ruler import official
from experiments.ruler.niah import NIAH
from experiments.ruler.official import official_wordings
from experiments.ruler.scoring import score_prediction
from experiments.ruler.sources import Sources
from experiments.ruler.tasks import TASKS, build_sets
from experiments.ruler.wordings import OWN, Asking
from tests.experiments import lm_eval_ruler
from tests.experiments.fakes import CharTokenizer
from tests.experiments.lm_eval_ruler import assignments, items, pattern
from tests.experiments.ruler_data import (
    count_pieces,
    count_words,
    most_common,
    solve,
    whole,
    write_folder,
)

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
FILES = {
    **{name: name for name in NIAH},
    **{"vt": "vt", "cwe": "cwe", "fwe": "fwe", "qa_1": "qa_squad", "qa_2": "qa_hotpot"},
}


@pytest.fixture(scope="module")
def wordings():
    pytest.importorskip("lm_eval")
    return official_wordings()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(str(write_folder(tmp_path_factory.mktemp("ruler"))))


def rows_of(sources, wordings, name, length, rows=2, count=count_pieces):
    measure = Measure(lengths=(length,), rows=rows, seed=0, chat=False, count=count)
    (task,), _ = build_sets([name], sources, measure, explicit=True, wordings=wordings)
    return task


# By these measures the part of a unit that fills up a length, which lm_eval has not, never fits.
def count_lines(spec, row):
    return 8 * whole(spec, row).count("\n")  # a needle has six tokens at the very least


def count_stops(spec, row):
    return whole(spec, row).count(".")


def prompt_of(task, row):
    return fill_prompt(task.spec.prompt, row)


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_asked_for_as_lm_eval_does(sources, wordings, name):
    needles = NIAH[name]
    count = count_stops if needles.haystack == "essay" else count_lines
    task = rows_of(sources, wordings, name, 200, rows=8, count=count)
    compared = 0
    for row in task.rows:
        sentences = None
        if needles.haystack == "essay":
            needle = pattern(wordings.niah.needle.replace("{kind}", needles.value))
            parts = re.split(needle.replace("(", "(?:"), row.context)
            # lm_eval doubles the space where no sentence stands between two needles.
            if not all(part.strip() for part in parts):
                continue
            sentences = [s.strip() for s in re.findall(r"[^.]+\.", "".join(parts))]
        made = lm_eval_ruler.niah(wordings, needles, row, sentences=sentences)
        assert made == (prompt_of(task, row), row.answer_prefix)
        compared += 1
    assert compared >= 2


def test_variables_are_tracked_as_in_lm_eval(sources, wordings):
    task = rows_of(sources, wordings, "vt", 2048, count=count_lines)
    for row in task.rows:
        assert lm_eval_ruler.vt(wordings, row) == (prompt_of(task, row), row.answer_prefix)


def test_common_words_are_listed_as_in_lm_eval(sources, wordings):
    task = rows_of(sources, wordings, "cwe", 2048)
    for row in task.rows:
        example, text = lm_eval_ruler.cwe(row, wordings.cwe.item)
        assert f"{example}\n{text}" == f"{prompt_of(task, row)} {row.answer_prefix}"


def test_code_words_are_shown_as_in_lm_eval(sources, wordings):
    task = rows_of(sources, wordings, "fwe", 2048)
    for row in task.rows:
        text = lm_eval_ruler.fwe(row, row.context.split(" "))
        assert text == f"{prompt_of(task, row)} {row.answer_prefix}"


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_passages_are_shown_as_in_lm_eval(sources, wordings, name):
    task = rows_of(sources, wordings, name, 1024)
    for row in task.rows:
        heading = wordings.qa.passage.partition("{text}")[0].format(number="@")
        passages = re.split(re.escape(heading).replace("@", r"\d+"), row.context)[1:]
        passages = [passage.removesuffix("\n\n") for passage in passages]
        (question,) = re.fullmatch(
            pattern(wordings.qa.asking.question, query="(.*)"), row.input
        ).groups()
        made = lm_eval_ruler.qa(passages, question, row.answers)
        assert made == (prompt_of(task, row), row.answer_prefix)


@pytest.mark.parametrize("name", TASKS)
def test_question_and_beginning_of_the_answer_are_joined_as_in_lm_eval(sources, wordings, name):
    settings = read_task(task_folder("ruler") / f"{FILES[name]}.yaml")
    assert settings["generation_kwargs"]["max_gen_toks"] == TASKS[name].max_new_tokens
    task = rows_of(sources, wordings, name, 1024, rows=1)
    tokenizer = CharTokenizer(chat=False)
    prompting = Prompting(protocol="official", max_length=None, eos_ids=(1,))
    text = tokenizer.decode(build_prompt(task.rows[0], task.spec, tokenizer, prompting).ids)
    delimiter = settings["target_delimiter"]
    assert text == f"{prompt_of(task, task.rows[0])}{delimiter}{task.rows[0].answer_prefix}"


def read_and_solve(task, prompt, wordings):
    """As `solve`, for any wordings."""
    if task in NIAH:
        asking = NIAH[task].asking(wordings)
        (query,) = re.findall(pattern(asking.question, query="(.*)"), prompt)
        needle = wordings.niah.needle.replace("{kind}", NIAH[task].value)
        found = re.findall(pattern(needle), prompt)
        keys = re.split(f"{wordings.niah.last}|, ", query)
        return " ".join(value for key, value in found if key in keys)
    if task == "vt":
        holding = {re.findall(pattern(wordings.vt.asking.question), prompt)[-1]}
        for name, source in assignments(wordings.vt, prompt):
            if source in holding:
                holding.add(name)
        return " ".join(holding)
    if task == "cwe":
        listed = prompt.split(wordings.cwe.asking.intro)[-1]
        return " ".join(most_common([word for _, word in items(wordings.cwe.item, listed)], 10))
    if task == "fwe":
        text = prompt.removeprefix(wordings.fwe.intro).split("\n")[0]
        return " ".join(most_common(re.findall("[a-z]+", text), 3))
    return solve(task, prompt)


@pytest.mark.parametrize(
    ("count", "length"), [(count_pieces, 1024), (count_pieces, 4096), (count_words, 700)]
)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_as_long_as_asked_and_an_oracle_scores_100(
    sources, wordings, name, count, length
):
    task = rows_of(sources, wordings, name, length, count=count)
    assert task == rows_of(sources, wordings, name, length, count=count)
    for row in task.rows:
        assert length - (16 if "qa" in name else 8) < row.length <= length
        assert row.length == count(task.spec, row) + TASKS[name].max_new_tokens
        solved = read_and_solve(name, whole(task.spec, row), wordings)
        assert score_prediction(task.spec, solved, row.answers, None) == 100


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_contexts_can_be_compressed_without_the_question(sources, wordings, name, chat):
    task = rows_of(sources, wordings, name, 1024, rows=1)
    (row,) = task.rows
    tokenizer = CharTokenizer(chat=chat)
    prompting = Prompting(protocol="official", max_length=None, eos_ids=(1,), query_agnostic=True)
    spec = rows_of(sources, wordings, name, 1024, rows=1).spec
    prompt = build_prompt(row, spec, tokenizer, prompting)
    context = tokenizer.decode(prompt.ids[: prompt.context_tokens])
    asked = tokenizer.decode(prompt.ids[prompt.context_tokens :])
    assert row.context.rstrip() in context
    assert row.input in asked
    assert asked.endswith(row.answer_prefix)


def test_wordings_change_nothing_that_is_drawn(sources, wordings):
    by_words = {
        w: rows_of(sources, w, "niah_multiquery", 1024, count=count_stops).rows
        for w in (OWN, wordings)
    }
    own, theirs = by_words.values()
    assert [row.answers for row in own] == [row.answers for row in theirs]


def texts_of(wordings):
    """All strings of a value of dataclasses and tuples."""
    if isinstance(wordings, str):
        return [wordings]
    parts = dataclasses.astuple(wordings) if dataclasses.is_dataclass(wordings) else wordings
    return [text for part in parts or () for text in texts_of(part)]


def runs_of_words(wordings, size=8):
    runs = set()
    for text in texts_of(wordings):
        words = re.findall(r"\w+", text.lower())
        runs |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    return runs


def test_own_wordings_share_no_run_of_8_words_with_the_official_ones(wordings):
    assert len(runs_of_words(wordings)) > 50
    assert not runs_of_words(OWN) & runs_of_words(wordings)


def test_lm_eval_is_read_and_not_imported(wordings, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)  # other tests go on with what they hold of it
    official_wordings()
    assert not any(name.split(".")[0] == "lm_eval" for name in sys.modules)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--prompts official .*restkv-jax\[eval\]"):
        official_wordings()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("niah_utils.py", "TEMPLATE =", "PROMPT =", "TEMPLATE: expected it once"),
        ("niah_utils.py", "{query}", "it", "with the fields .*query"),
        ("niah_utils.py", "{query}", "{question}", "unknown field 'question'"),
        ("prepare_niah.py", "\nNEEDLE =", "\nNEEDLES =", "NEEDLE: expected it once"),
        ("prepare_niah.py", "def get_haystack", "def haystack", "function get_haystack"),
        ("prepare_niah.py", "template.replace", "template.change", "expected replacements"),
        ("prepare_niah.py", '"gen_prefix"', '"prefix"', "'gen_prefix' in generate_samples"),
        ("prepare_niah.py", "for {query}", "for {queries}", "unknown field 'queries'"),
        ("vt_utils.py", '"answer_prefix"', '"prefix"', "key 'answer_prefix'"),
        ("vt_utils.py", "    noise =", "    filler =", "noise in generate_input_output"),
        ("vt_utils.py", "this_vars[j]} ", "this_vars[j]} {j}", "generate_chains: .*fields"),
        ("cwe_utils.py", "{i + 1}. ", "", "get_example: .*fields"),
        ("fwe_utils.py", "{context}", "", "{context} once"),
        ("qa_utils.py", '"template": """', '"template": """{query} ', "question stands after"),
        ("qa_utils.py", "{document}", "{text}", "unknown field 'text'"),
        ("qa_utils.py", "DOCUMENT_PROMPT =", "DOCUMENT_PROMPT = 3 +", "malformed"),
        ("niah_single_1.yaml", "target_delimiter", "delimiter", "target_delimiter"),
        ("cwe.yaml", "include:", "include: [", "cwe.yaml"),
        ("vt_utils.py", "CONFIG =", "CONFIG ==", "SyntaxError|CONFIG: expected it once"),
    ],
)
def test_a_changed_lm_eval_is_named(tmp_path, monkeypatch, file, old, new, message):
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(task_folder("ruler"), tmp_path / "ruler")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    monkeypatch.setattr(official, "task_folder", lambda name: folder)
    with pytest.raises(UserError, match=rf"(?s)wordings in {file} from lm_eval \d.*({message})"):
        official_wordings()


def test_a_missing_file_of_lm_eval_is_named(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(task_folder("ruler"), tmp_path / "ruler")
    (folder / "fwe_utils.py").unlink()
    monkeypatch.setattr(official, "task_folder", lambda name: folder)
    with pytest.raises(UserError, match=r"wordings in fwe_utils\.py from lm_eval \d"):
        official_wordings()


@pytest.mark.parametrize("template", ["{context}", "no text?", "{query} {context} asked"])
def test_templates_without_a_question_behind_the_text_are_refused(template):
    with pytest.raises(ValueError, match="expected a template"):
        Asking(template=template, prefix="It is")


def test_the_run_says_which_wordings_it_has(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    folder = write_folder(tmp_path)
    ran = []
    monkeypatch.setattr(program, "run_benchmark", lambda *a: ran.append(a[-1]) or 0)
    arguments = ["--model", MODEL, "--data", str(folder), "--rows", "1", "--tasks", "fwe,qa_1"]
    for chosen in ([], ["--prompts", "official"]):
        assert program.main([*arguments, *chosen]) == 0
    own, theirs = ran
    assert "own wordings" in own.title
    assert "official wordings" in theirs.title
    assert (own.settings["prompts"], theirs.settings["prompts"]) == ("own", "official")
    assert [task.checksum for task in own.sets] != [task.checksum for task in theirs.sets]
    assert theirs.sets[0].spec.prompt.startswith(official_wordings().fwe.intro)
