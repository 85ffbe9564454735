"""The tasks of ours for the harness: what they ask, and that the harness reads them."""

from __future__ import annotations

import re

import pytest

from experiments.core.errors import run_main
from experiments.lm_eval.__main__ import main
from experiments.lm_eval.offline import TASKS, last_words, next_lines, write_tasks
from experiments.longbench.stdlib_text import code_files, prose_sentences


def test_the_last_word_ends_its_passage_and_stands_in_it_before():
    text = " ".join(prose_sentences())
    docs = last_words(8)
    assert len({doc["context"] for doc in docs}) == 8
    for doc in docs:
        assert f"{doc['context']} {doc['target']}." in text
        assert re.search(rf"\b{doc['target']}\b", doc["context"])
        assert len(doc["context"].split()) >= 399


def test_only_the_labelled_line_comes_next():
    files = {name: "\n".join(lines) for name, lines in code_files().items()}
    for doc in next_lines(8):
        assert len(set(doc["choices"])) == 4
        follows = [
            any(f"{doc['context']}\n{choice}\n" in f"{text}\n" for text in files.values())
            for choice in doc["choices"]
        ]
        assert follows == [label == doc["label"] for label in range(4)]


def test_the_tasks_are_written_once(tmp_path):
    folder = write_tasks(tmp_path, 2)
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert sorted(files) == sorted(f"{name}.jsonl" for name in TASKS)
    assert write_tasks(tmp_path, 2) == folder
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert write_tasks(tmp_path, 3) != folder


# The harness's own: its data library.
@pytest.mark.filterwarnings("ignore")
def test_the_harness_reads_them(tmp_path, monkeypatch):
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = write_tasks(tmp_path, 2)
    loaded = lm_eval_tasks.TaskManager(include_path=str(folder)).load_task_or_group(list(TASKS))
    last, following = (loaded[name] for name in TASKS)
    for task, docs in ((last, last_words(2)), (following, next_lines(2))):
        assert [task.doc_to_text(doc) for doc in task.test_docs()] == [d["context"] for d in docs]
    assert [last.doc_to_target(doc) for doc in last.test_docs()] == [
        f" {doc['target']}" for doc in last_words(2)
    ]
    asked = last.construct_requests(doc := last_words(1)[0], doc["context"], metadata=(None, 0, 1))
    assert asked.args == (doc["context"], f" {doc['target']}")
    doc = next_lines(2)[0]
    assert following.doc_to_choice(doc) == doc["choices"]
    assert following.doc_to_target(doc) == doc["label"]


def test_without_tasks_only_offline_has_some(capsys):
    pytest.importorskip("lm_eval")
    assert run_main(lambda: main([])) == 2
    assert "--tasks: expected the names of tasks" in capsys.readouterr().err
