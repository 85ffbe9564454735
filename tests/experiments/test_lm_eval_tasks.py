"""Task files and data that cannot be read: one line that names them, before anything is made."""

from __future__ import annotations

import json

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.harness import read_task
from experiments.lm_eval.__main__ import main
from experiments.lm_eval.tasks import check_rows, find_tasks, load_tasks
from tests.experiments.test_lm_eval import MODEL

ROW = {"text": "The harbour", "choices": ["a", "b"], "label": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task that can be loaded, others that cannot, a group and a tag with some of those."""
    folder = tmp_path_factory.mktemp("tasks")
    row = json.dumps(ROW) + "\n"
    texts = {
        "good": row,
        "broken": row + '{"text": bro\n' + row,
        "empty": "",
        "late": row * 2 + json.dumps(ROW | {"choices": None}) + "\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text(text)

    def write(name, data, extra=""):
        (folder / f"{name}.yaml").write_text(
            f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / data}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: choices
{extra}
"""
        )

    write("fine", "good", "tag: some")
    write("broken_row", "broken")
    write("no_rows", "empty")
    write("no_file", "nowhere", "tag: some")
    write("no_option", "good", "doc_to_txt: text")
    write("late_row", "late", "doc_to_decontamination_query: text")
    write("late_template", "late", "doc_to_text: '{{text + choices[label]}}'")
    # What another file includes is read along with it, wherever it lies; it is no task by itself.
    (folder / "parts").mkdir()
    (folder / "parts/shared.yaml").write_text("num_fewshot: 0\n")
    write("parted", "good", "include: [parts/shared.yaml, fine.yaml]")
    (folder / "several.yaml").write_text("group: several\ntask: [fine, broken_row]\n")
    (folder / "malformed.yaml").write_text("task: malformed\noutput_type: [multiple_choice\n")
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return find_tasks(["fine"], folder)


# The harness's own: its data library.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("broken_row", ["--tasks broken_row", "broken.jsonl", "JSON parse error", "row 1"]),
        ("several", ["--tasks broken_row", "broken_row.yaml", "broken.jsonl"]),
        ("some", ["--tasks no_file", "nowhere.jsonl"]),
        ("no_rows", ["--tasks no_rows", "empty.jsonl"]),
        ("no_option", ["--tasks no_option", "no_option.yaml", "doc_to_txt"]),
    ],
)
def test_what_cannot_be_loaded_is_named(manager, tmp_path, monkeypatch, asked, said):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(load_tasks(manager, ["fine"])) == ["fine"]
    with pytest.raises(UserError) as caught:
        load_tasks(manager, ["fine", asked])
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reason"), [("late_row", "TypeError"), ("late_template", "UndefinedError")]
)
def test_a_row_that_does_not_fit_its_templates_is_named(
    manager, tmp_path, monkeypatch, name, reason
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = load_tasks(manager, ["fine", name])
    check_rows(tasks, limit=2, fewshot=None, seed=0)
    with pytest.raises(UserError, match=rf"--tasks {name}: no prompt .* of row 2: {reason}"):
        check_rows(tasks, limit=None, fewshot=None, seed=0)


@pytest.mark.filterwarnings("ignore")
def test_examples_that_cannot_be_made_are_named(manager, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # All of three rows are drawn, one of which is broken.
    late = load_tasks(manager, ["late_template"])
    with pytest.raises(UserError, match=r"of row 0 after 3 examples: UndefinedError"):
        check_rows(late, limit=1, fewshot=3, seed=0)
    with pytest.raises(UserError, match=r"--tasks fine: .* after 2 examples: ValueError"):
        check_rows(load_tasks(manager, ["fine"]), limit=1, fewshot=2, seed=0)  # it has one row


def test_a_malformed_task_file_is_named(folder, manager, monkeypatch):
    # Every file of the harness takes seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: manager)
    with pytest.raises(UserError, match=r"(?s)task 'malformed'; .*malformed\.yaml.* line 3"):
        find_tasks(["fine", "malformed"], folder)
    assert read_task(folder / "parted.yaml")["num_fewshot"] == 0
    with pytest.raises(UserError, match=r"unknown task 'malformed'$"):
        find_tasks(["malformed"], None)


@pytest.mark.filterwarnings("ignore")
def test_broken_data_ends_a_run_before_it_begins(folder, manager, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("experiments.lm_eval.__main__.find_tasks", lambda *_: manager)
    out = tmp_path / "run"
    arguments = ["--model", MODEL, "--out", str(out), "--data", str(folder)]
    assert run_main(lambda: main([*arguments, "--tasks", "fine,broken_row"])) == 2
    error = capsys.readouterr().err
    complaints = [line for line in error.splitlines() if line and "examples/s" not in line]
    assert len(complaints) == 1
    assert complaints[0].startswith("error: --tasks broken_row: cannot be loaded (")
    assert not out.exists()
