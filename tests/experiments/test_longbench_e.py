"""LongBench-E: which files, which bucket, and the scores of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.results import ResultStore
from experiments.core.tasks import Row, TaskSet
from experiments.longbench.__main__ import main
from experiments.longbench.buckets import bucket_of, write_buckets
from experiments.longbench.data import load_folder
from experiments.longbench.sets import LONGBENCH_SETS

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")


def row(length):
    return Row(input="q", context="c", answers=("a",), length=length)


def test_buckets_are_the_official_ones():
    lengths = (0, 3999, 4000, 7999, 8000, 10**6)
    assert [bucket_of(n) for n in lengths] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"]


def test_scores_by_bucket(tmp_path):
    sets = [
        TaskSet(spec=LONGBENCH_SETS[name], rows=tuple(map(row, lengths)), source="")
        for name, lengths in (("trec", (1, 2, 5000)), ("lcc", (3, 4, 5000)))
    ]
    scores = {"full": {"trec": [100.0, 0.0, 50.0], "lcc": [10.0, 50.0, 20.0]}}
    with ResultStore.open(tmp_path, {}) as store:
        (table,) = write_buckets(store, scores, sets)
    assert table.rows == (
        ("trec 0-4k", "2", "50.00 ± 50.00"),
        ("lcc 0-4k", "2", "30.00 ± 20.00"),
        # Errors of independent sets: sqrt(50^2 + 20^2) / 2.
        ("mean of sets 0-4k", "", "40.00 ± 26.93"),
        ("trec 4-8k", "1", "50.00"),
        ("lcc 4-8k", "1", "20.00"),
        # A set of one row has no error, and so neither has a mean with it.
        ("mean of sets 4-8k", "", "35.00"),
    )
    assert json.loads((tmp_path / "pred/full/result_e.json").read_text()) == {
        "trec": {"0-4k": 50.0, "4-8k": 50.0, "8k+": None},
        "lcc": {"0-4k": 30.0, "4-8k": 20.0, "8k+": None},
    }


def test_a_run_takes_the_even_files_alone(tmp_path, capsys):
    record = {
        "input": "Which?",
        "context": "One sentence. " * 30,
        "answers": ["x"],
        "length": 4500,
        "all_classes": None,
        "_id": "1",
    }
    (tmp_path / "hotpotqa.jsonl").write_text("{}\n")
    (tmp_path / "qasper_e.jsonl").write_text(json.dumps(record) + "\n")
    arguments = ["--model", MODEL, "--data", str(tmp_path), "--max-length", "64", "--longbench-e"]
    arguments += ["--policy", "full", "--limit", "1", "--out", str(tmp_path / "run")]
    assert run_main(lambda: main(arguments)) == 0
    printed = capsys.readouterr().out
    assert "LongBench-E" in printed
    assert "qasper 4-8k" in printed
    assert "hotpotqa" not in printed
    specs = [LONGBENCH_SETS["hotpotqa"]]
    with pytest.raises(UserError, match=r"hotpotqa_e\.jsonl"):
        load_folder(tmp_path, specs, explicit=True, even=True)
