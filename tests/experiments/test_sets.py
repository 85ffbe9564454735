"""The prompts: own wordings, official ones read from lm_eval."""

import importlib.util
import re
import sys

import pytest

from experiments.core.errors import UserError
from experiments.core.tasks import Row, fill_prompt
from experiments.longbench.sets import LONGBENCH_SETS, from_jinja, official_prompts

NAMES = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
]
LENGTHS = [128, 128, 64, 32, 32, 32, 512, 512, 512, 64, 32, 128, 32, 32, 64, 64]
WITHOUT_INPUT = {"gov_report", "multi_news", "passage_count", "lcc"}
WITHOUT_CHAT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def fields(prompt):
    return set(re.findall(r"\{(\w+)\}", prompt))


@pytest.mark.parametrize("name", NAMES)
def test_own_prompts_have_the_fields_lengths_and_rules(name):
    spec = LONGBENCH_SETS[name]
    assert spec.max_new_tokens == LENGTHS[NAMES.index(name)]
    assert fields(spec.prompt) == {"context"} | (set() if name in WITHOUT_INPUT else {"input"})
    assert spec.chat == (name not in WITHOUT_CHAT)
    assert spec.first_line_only == (name in {"trec", "triviaqa", "samsum"})
    assert spec.stop_at_newline == (name == "samsum")


def test_there_are_16_sets():
    assert list(LONGBENCH_SETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_official_prompts_are_read_with_the_same_fields(name):
    pytest.importorskip("lm_eval")
    official, own = official_prompts([name])[name], LONGBENCH_SETS[name]
    assert fields(official.prompt) == fields(own.prompt)
    assert official.max_new_tokens == own.max_new_tokens
    assert official.prompt != own.prompt
    row = Row(input="IN {context}", context="CON {input}", answers=("a",), length=1)
    filled = fill_prompt(official.prompt, row)
    assert "CON {input}" in filled
    assert ("IN {context}" in filled) == (name not in WITHOUT_INPUT)


def runs_of_words(text, size=8):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_own_prompts_share_no_run_of_8_words_with_any_official_one(name):
    pytest.importorskip("lm_eval")
    official = official_prompts(NAMES)
    own = runs_of_words(LONGBENCH_SETS[name].prompt)
    assert not own & set().union(*(runs_of_words(spec.prompt) for spec in official.values()))


def test_official_prompts_without_lm_eval_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"restkv-jax\[eval\]"):
        official_prompts(["trec"])


def test_reading_official_prompts_does_not_import_lm_eval(monkeypatch):
    pytest.importorskip("yaml")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)  # other tests go on with what they hold of it
    official_prompts(["trec"])
    assert not any(name.split(".")[0] == "lm_eval" for name in sys.modules)


@pytest.mark.parametrize("template", ["{{other}} {{context}}", "{% if x %}{{context}}", "plain"])
def test_templates_that_are_not_understood_are_refused(template):
    with pytest.raises(ValueError, match="template"):
        from_jinja(template)
