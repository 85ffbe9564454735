"""A finished run as kvpress lays it out."""

from __future__ import annotations

import csv
import io
import json

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.progress import RunProgress
from experiments.core.prompts import Prompting
from experiments.core.results import prediction_row
from experiments.core.runner import generating
from experiments.core.session import describe_sets, run_session
from experiments.core.tasks import Row, SetSpec, TaskSet
from experiments.export import export, main
from experiments.ruler.__main__ import prediction_row as ruler_row
from experiments.ruler.scoring import score_prediction
from tests.experiments.fakes import EOS, CharTokenizer, FakeEngine

POLICIES = ("full", "restkv+alpha=0.5")


def finished_run(folder, benchmark, names, record, *, query_agnostic):
    """The fake engine keeps all slots of the full cache and 12.5 of another one's."""
    row = Row(
        input='a "b",\nc',
        context="x" * 16,
        answers=("é", "q"),
        length=256,
        answer_prefix="So:",
    )
    sets = [
        TaskSet(
            spec=SetSpec(
                name=name,
                prompt="{context}{input}",
                max_new_tokens=20,
                metric="string_match_all",
                chat=False,
            ),
            rows=(row,),
            source="",
        )
        for name in names
    ]
    config = {
        "benchmark": benchmark,
        "model": "owner/name",
        "policies": {policy: {"name": policy} for policy in POLICIES},
        "seed": 0,
        "version": "1",
        "query_agnostic": query_agnostic,
        "sets": describe_sets(sets),
    }
    prompting = Prompting(
        protocol="official", max_length=None, eos_ids=(EOS,), query_agnostic=query_agnostic
    )
    run_session(
        folder=folder,
        config=config,
        environment={},
        title="",
        sets=sets,
        policies=POLICIES,
        make_ask=lambda: generating(FakeEngine(), CharTokenizer(), prompting, 0),
        score=score_prediction,
        record=record,
        progress=RunProgress(io.StringIO()),
    )
    return folder


@pytest.fixture
def results(tmp_path):
    """Two lengths of RULER, contexts compressed before the question."""
    names = [f"{length}/{task}" for length in (256, 512) for task in ("vt", "fwe")]
    return finished_run(tmp_path / "run", "ruler", names, ruler_row, query_agnostic=True)


def read_folder(folder):
    """Rows of predictions.csv, and the settings of config.yaml."""
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = (folder / "config.yaml").read_text().splitlines()
    pairs = (line.partition(": ") for line in lines)
    return rows, {key: json.loads(value) for key, _, value in pairs}


def test_folders_are_named_and_filled_as_there(results, capsys):
    assert run_main(lambda: main([str(results)])) == 0
    names = sorted(path.name for path in (results / "kvpress").iterdir())
    # Of 17 tokens of context, the one that begins a text included; the full cache keeps them all.
    assert names == [
        f"ruler__{length}__owner--name__{policy}__{ratio}"
        for length in (256, 512)
        for policy, ratio in (("full", "0.00"), ("restkv+alpha=0.5", "0.26"))
    ]
    assert all(name in capsys.readouterr().out for name in names[:1])
    folder = results / "kvpress" / names[1]
    rows, settings = read_folder(folder)
    stored = (results / "pred/restkv+alpha=0.5/256/vt.jsonl").read_text()
    assert [row["task"] for row in rows] == ["vt", "fwe"]
    assert rows[0]["predicted_answer"] == json.loads(stored)["pred"]
    assert (rows[0]["question"], rows[0]["answer_prefix"]) == ('a "b",\nc', "So:")
    assert json.loads(rows[0]["answer"]) == ["é", "q"]
    assert (rows[0]["max_new_tokens"], rows[0]["compression_ratio"]) == ("20", "0.2647")
    assert json.loads((folder / "metrics.json").read_text()) == {
        "vt": {"string_match": 50.0},
        "fwe": {"string_match": 50.0},
    }
    assert (settings["data_dir"], settings["press_name"]) == ("256", "restkv+alpha=0.5")
    assert (settings["compression_ratio"], settings["query_aware"]) == (0.2647, False)
    assert settings["compression_ratio_of"] == "context"


def test_a_benchmark_without_lengths_that_sees_the_question(tmp_path):
    run = finished_run(
        tmp_path / "run", "longbench", ["hotpotqa", "trec"], prediction_row, query_agnostic=False
    )
    full, evicted = export(run, tmp_path / "out")
    # 12.5 slots of 29 tokens: a beginning, 16 of context, 8 of question, a newline and the prefix.
    assert full.name == "longbench__owner--name__full__0.00__query_aware"
    assert evicted.name == "longbench__owner--name__restkv+alpha=0.5__0.57__query_aware"
    rows, settings = read_folder(evicted)
    assert [row["task"] for row in rows] == ["hotpotqa", "trec"]
    assert (rows[0]["question"], rows[0]["answer_prefix"]) == ('a "b",\nc', "So:")
    assert (settings["data_dir"], settings["query_aware"]) == (None, True)


def test_runs_of_earlier_versions_say_what_their_ratios_are_of(results, tmp_path):
    for path in results.glob("timing/**/*.jsonl"):
        cost = json.loads(path.read_text())
        del cost["context_tokens"]
        path.write_text(json.dumps(cost) + "\n")
    for path in results.glob("pred/**/*.jsonl"):
        row = json.loads(path.read_text())
        del row["answer_prefix"]
        path.write_text(json.dumps(row) + "\n")
    folder = export(results, tmp_path / "out")[0]
    rows, settings = read_folder(folder)
    # 17 of 29 tokens, the question among them, were kept.
    assert settings["compression_ratio_of"] == "prompt"
    assert rows[0]["compression_ratio"] == f"{1 - 17 / 29:.4f}"
    assert rows[0]["answer_prefix"] == ""


def test_unfinished_and_other_folders_are_refused(results, tmp_path):
    with pytest.raises(UserError, match=r"run_meta\.json: cannot be read"):
        export(tmp_path, tmp_path / "out")
    meta = json.loads((results / "run_meta.json").read_text())
    other = {**meta, "config": {"benchmark": "lm_eval"}}
    (results / "run_meta.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="lm_eval has no answers to export"):
        export(results, tmp_path / "out")
    (results / "run_meta.json").write_text(json.dumps({**meta, "finished": False}))
    with pytest.raises(UserError, match="not finished"):
        export(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()
