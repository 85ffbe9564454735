"""What is reported of the harness's results: rows, figures of whole sets, compression."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from experiments.core.errors import run_main
from experiments.core.storage import RowFile
from experiments.lm_eval.__main__ import main
from experiments.lm_eval.report import (
    Metric,
    metric_rows,
    report_tables,
    sort_metrics,
    summarise_sets,
)
from experiments.lm_eval.scoring import compression_table, read_compression
from tests.experiments.test_lm_eval import CONTEXT, MODEL


def samples(*rows, task="t", filters=("none",)):
    """The harness's samples: rows of metric -> value, backwards, as their order is in `doc_id`."""
    return {
        "samples": {
            task: [
                {"doc_id": i, "filter": name, "metrics": list(row), **row}
                for name in filters
                for i, row in reversed(list(enumerate(rows)))
            ]
        }
    }


def test_rows_are_read_in_their_order():
    rows = metric_rows(samples({"acc": 0.0, "f1": (0, 1)}, {"acc": 1.0, "f1": (1, 1)}))
    assert rows == {
        Metric("t", "acc,none", "t acc"): [0.0, 1.0],
        Metric("t", "f1,none", "t f1"): [(0, 1), (1, 1)],
    }
    both = metric_rows(samples({"acc": 0.0}, filters=("strict", "flexible")))
    assert [metric.label for metric in both] == ["t acc flexible", "t acc strict"]
    assert [metric.name for metric in both] == ["acc", "acc"]


def spread(rows):
    """A figure of a whole set of pairs."""
    return max(a for a, _ in rows) - min(b for _, b in rows)


def sort(first, second, aggregate):
    rows = {"x": metric_rows(first), "y": metric_rows(second)}
    return sort_metrics(rows, lambda metric: aggregate)


def test_metrics_are_sorted_alike_for_all_policies():
    # "wild" is no share for y; "part" is missing in a row of x; "text" would be slow.
    text = {"text": ("a", "b")}
    found = sort(
        samples({"acc": True, "wild": 0.5, "part": 1.0} | text, {"acc": 0.5, "wild": 1} | text),
        samples(*({"acc": acc, "wild": 2.0 - acc, "part": 1.0} | text for acc in (0, 1))),
        statistics.fmean,
    )
    assert found.scores == {"x": {"t acc": [100.0, 50.0]}, "y": {"t acc": [0.0, 100.0]}}
    assert found.parts == {"x": {"t wild": [0.5, 1]}, "y": {"t wild": [2.0, 1.0]}}
    assert [metric.label for metric in found.others] == ["t part", "t text"]


def test_figures_of_sets_have_errors_where_they_can_be_had():
    pairs = samples(*({"wide": (i, -i)} for i in range(6)))
    found = sort(pairs, pairs, spread)
    summary = summarise_sets(found)
    assert summary["score"]["y"] == {"t wide": 10.0}
    assert 0 < summary["standard_error"]["x"]["t wide"] < 5
    zero = {"difference": 0.0, "low": 0.0, "high": 0.0, "n": 6}
    assert summary["paired"][0]["sets"]["t wide"] == zero
    for aggregate in (None, lambda rows: math.nan, lambda rows: {"not": "a number"}):
        assert [metric.name for metric in sort(pairs, pairs, aggregate).others] == ["wide"]


def test_a_figure_that_some_draws_do_not_have_has_no_error():
    rows = samples(*({"ppl": -600.0 - 30 * i} for i in range(6)))
    found = sort(rows, rows, lambda values: math.exp(-statistics.fmean(values)))
    summary = summarise_sets(found)
    assert summary["score"]["x"]["t ppl"] == pytest.approx(math.exp(675))
    assert summary["standard_error"]["x"]["t ppl"] is None
    assert summary["paired"][0]["sets"]["t ppl"]["high"] is None


def test_where_nothing_was_written_down_no_compression_is_said(tmp_path):
    nothing = read_compression(RowFile(tmp_path / "none.jsonl"))
    assert compression_table({"full": nothing}).rows == (("full", "0", *["-"] * 5),)


def test_a_run_without_any_metric_reports_no_empty_tables():
    empty = summarise_sets(sort(samples(), samples(), None))
    assert report_tables(empty, empty, {"x": {}, "y": {}}, []) == ([], [], [])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks without a score for each row: whole texts, a correlation, a function of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"{CONTEXT} {i} boats", "choices": ["come in", "go out"], "label": i % 2}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text("def count(rows):\n    return 1000.0 + len(rows)\n")
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
"""
    choice = f"""{shared}output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: mcc
"""
    (folder / "whole.yaml").write_text(
        f"""task: whole{shared}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
    )
    (folder / "linked.yaml").write_text(f"task: linked{choice}")
    (folder / "counted.yaml").write_text(
        f"task: counted{choice}    aggregation: !function own.count\n"
    )
    return folder


# The harness's own: its data library and its SQLite files.
@pytest.mark.filterwarnings("ignore")
def test_tasks_without_a_score_for_each_row(tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out, policies = tmp_path / "run", ("full", "streaming")
    arguments = ["--model", MODEL, "--out", str(out), "--data", str(tasks), "--budget", "12"]
    arguments += ["--tasks", "whole,linked,counted", "--evict-every", "4"]
    arguments += [f"--policy={policy}" for policy in policies]
    assert run_main(lambda: main(arguments)) == 0
    assert json.loads((out / "run_meta.json").read_text())["finished"]
    printed = capsys.readouterr().out
    assert "mean of the rows" not in printed

    # Six whole texts, and six contexts that two tasks share.
    (file,) = out.glob("requests/streaming-*.jsonl")
    compression = read_compression(RowFile(file))
    assert (compression.contexts, compression.evicted) == (12, 12)
    assert f"{compression.factor:.2f}x" in printed
    stored = json.loads((out / "compression.json").read_text())
    assert (stored["full"]["contexts"], stored["full"]["compression"]) == ("12", "1.00x")
    assert stored["full"]["tokens"] == stored["full"]["kept slots"]

    sets, harness = (json.loads((out / f).read_text()) for f in ("sets.json", "harness.json"))
    names = {"whole word_perplexity", "whole bits_per_byte", "linked mcc"}
    for policy in policies:
        assert sets["n"][policy] == dict.fromkeys(names, 6)
        for name in names:
            task, metric = name.split()
            figure = harness[policy][task][f"{metric},none"]
            assert sets["score"][policy][name] == pytest.approx(figure, abs=1e-4)
        assert sets["standard_error"][policy]["whole bits_per_byte"] > 0
    assert sets["paired"][0]["sets"]["whole bits_per_byte"]["low"] is not None
    # A function of the task's own is called by the harness alone, and has no error.
    (line,) = (line for line in printed.splitlines() if "counted mcc" in line)
    assert line.split()[2:] == ["1006.0000", "1006.0000"]
