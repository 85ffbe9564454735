"""A finished run as kvpress lays it out."""

from __future__ import annotations

import csv
import io
import json

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.progress import RunProgress
from experiments.core.prompts import Prompting
from experiments.core.runner import generating
from experiments.core.session import describe_sets, run_session
from experiments.core.tasks import Row, SetSpec, TaskSet
from experiments.export import export, main
from experiments.ruler.__main__ import prediction_row
from experiments.ruler.scoring import score_prediction
from tests.experiments.fakes import EOS, CharTokenizer, FakeEngine


@pytest.fixture
def results(tmp_path):
    """A run of two lengths; the fake engine keeps 12.5 slots of each prompt."""
    sets = [
        TaskSet(
            spec=SetSpec(
                name=f"{length}/{task}",
                prompt="{context}{input}",
                max_new_tokens=20,
                metric="string_match_all",
                chat=False,
            ),
            rows=(Row(input='a "b",\nc', context="x" * 16, answers=("é", "q"), length=length),),
            source="",
        )
        for length in (256, 512)
        for task in ("vt", "fwe")
    ]
    policies = ("full", "restkv+alpha=0.5")
    config = {
        "benchmark": "ruler",
        "model": "owner/name",
        "policies": {policy: {"name": policy} for policy in policies},
        "seed": 0,
        "version": "1",
        "query_agnostic": True,
        "sets": describe_sets(sets),
    }
    prompting = Prompting(protocol="official", max_length=None, eos_ids=(EOS,))
    run_session(
        folder=tmp_path / "run",
        config=config,
        environment={},
        title="",
        sets=sets,
        policies=policies,
        make_ask=lambda: generating(FakeEngine(), CharTokenizer(), prompting, 0),
        score=score_prediction,
        record=prediction_row,
        progress=RunProgress(io.StringIO()),
    )
    return tmp_path / "run"


def test_folders_are_named_and_filled_as_there(results, capsys):
    assert run_main(lambda: main([str(results)])) == 0
    names = sorted(path.name for path in (results / "kvpress").iterdir())
    # 12.5 slots of 25 tokens, the one that begins a text included.
    assert names == [
        f"ruler__{length}__owner--name__{policy}__0.50"
        for length in (256, 512)
        for policy in ("full", "restkv+alpha=0.5")
    ]
    assert all(name in capsys.readouterr().out for name in names[:1])
    folder = results / "kvpress" / names[1]
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stored = (results / "pred/restkv+alpha=0.5/256/vt.jsonl").read_text()
    assert [row["task"] for row in rows] == ["vt", "fwe"]
    assert rows[0]["predicted_answer"] == json.loads(stored)["pred"]
    assert rows[0]["question"] == 'a "b",\nc'
    assert json.loads(rows[0]["answer"]) == ["é", "q"]
    assert (rows[0]["max_new_tokens"], rows[0]["compression_ratio"]) == ("20", "0.5")
    assert json.loads((folder / "metrics.json").read_text()) == {
        "vt": {"string_match": 50.0},
        "fwe": {"string_match": 50.0},
    }
    lines = (folder / "config.yaml").read_text().splitlines()
    read = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines)}
    assert (read["data_dir"], read["press_name"]) == ("256", "restkv+alpha=0.5")
    assert (read["compression_ratio"], read["query_aware"]) == (0.5, False)


def test_unfinished_and_other_folders_are_refused(results, tmp_path):
    with pytest.raises(UserError, match=r"run_meta\.json: cannot be read"):
        export(tmp_path, tmp_path / "out")
    meta = json.loads((results / "run_meta.json").read_text())
    (results / "run_meta.json").write_text(json.dumps({**meta, "finished": False}))
    with pytest.raises(UserError, match="not finished"):
        export(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()
