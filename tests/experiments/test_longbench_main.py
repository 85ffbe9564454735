"""The program as a user runs it, on a tiny checkpoint and rows made here."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.core import engine as engines
from experiments.core.errors import UserError, run_main
from experiments.core.options import Slots, parse_policy
from experiments.core.plans import describe_plan, make_plan, make_policy
from experiments.longbench.__main__ import main
from experiments.longbench.cli import TEMPLATE_ROOM, longest_text
from restkv_jax.decode import TOVA, AdaKV, CachePlan, RestKV, SnapKV
from tests.experiments.programs import assert_refused, interrupted_after

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
POLICIES = ("full", "streaming", "snapkv", "restkv", "restkv+preset=paper")
ARGUMENTS = [
    *("--model", MODEL, "--sets", "hotpotqa,trec", "--budget", "48", "--max-length", "150"),
    *("--policy", "full", "--policy", "streaming", "--policy", "snapkv"),
    *("--policy", "restkv", "--policy", "restkv:preset=paper"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, classes in (("hotpotqa", None), ("trec", ["Date", "City"])):
        rows = [
            {
                "input": f"Which number is {i}?",
                "context": " ".join(f"Sentence {j} tells of number {i * j}." for j in range(9 + i)),
                "answers": [f"number {i}"],
                "length": 40,
                "dataset": name,
                "language": "en",
                "all_classes": classes,
                "_id": f"{name}{i}",
            }
            for i in range(3)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def run(data, out, *extra):
    return run_main(lambda: main([*ARGUMENTS, "--data", str(data), "--out", str(out), *extra]))


def files(folder):
    """What a run leaves, without times, sessions and locks."""
    names = [*sorted(folder.glob("pred/**/*.json*")), folder / "result.json"]
    return {str(name.relative_to(folder)): name.read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert run(data, out) == 0
    return out


def test_a_run_leaves_predictions_scores_and_settings(whole, data):
    for policy in POLICIES:
        rows = [
            json.loads(line)
            for line in (whole / f"pred/{policy}/hotpotqa.jsonl").read_text().splitlines()
        ]
        assert [row["answers"] for row in rows] == [[f"number {i}"] for i in range(3)]
        assert all({"pred", "answers", "all_classes", "length"} <= set(row) for row in rows)
    result = json.loads((whole / "result.json").read_text())
    assert set(result["score"]) == set(POLICIES)
    assert set(result["score"]["restkv"]) == {"hotpotqa", "trec"}
    meta = json.loads((whole / "run_meta.json").read_text())
    text = json.dumps(meta)
    for fact in ("qwen3_qknorm", "jax", "git_commit", "official", "own", '"seed"', "48"):
        assert fact in text


def test_costs_are_those_of_the_policies(whole):
    def timing(policy):
        lines = (whole / f"timing/{policy}/hotpotqa.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    full, evicted = timing("full"), timing("restkv")
    for a, b in zip(full, evicted, strict=True):
        assert a["kept_slots"] == a["prompt_tokens"] == b["prompt_tokens"] > 48
        assert b["kept_slots"] == 48
        assert b["cache_bytes"] < a["cache_bytes"]


def test_one_prefill_serves_all_policies(data, tmp_path, monkeypatch):
    calls, original = [], engines.prefill

    def counted(model, tokens, valid, *, plans):
        if isinstance(tokens, np.ndarray):  # not when shapes alone are traced
            calls.append(len(plans))
        return original(model, tokens, valid, plans=plans)

    monkeypatch.setattr(engines, "prefill", counted)
    assert run(data, tmp_path / "run", "--limit", "1") == 0
    assert calls == [5, 5]


def test_an_interrupted_run_goes_on_and_ends_the_same(whole, data, tmp_path, capsys):
    out = tmp_path / "run"
    with interrupted_after(3):
        assert run(data, out) == 130
    assert "resume" in capsys.readouterr().err
    assert run(data, out) == 0
    assert files(out) == files(whole)


def test_another_configuration_never_reuses_rows(whole, data, capsys):
    before = files(whole)
    assert run(data, whole, "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err
    assert files(whole) == before


def test_the_table_names_the_real_benchmark_and_the_offline_suite_apart(whole, capsys, tmp_path):
    assert "LongBench" in (whole / "table.md").read_text()
    arguments = ["--model", MODEL, "--sets", "few_shot", "--offline-rows", "1"]
    arguments += ["--policy", "full", "--policy", "restkv", "--budget", "0.2"]
    out = ["--out", str(tmp_path / "run")]
    assert run_main(lambda: main([*arguments, *out])) == 0
    printed = capsys.readouterr().out
    assert "NOT LongBench" in printed
    assert "--data hub" in printed
    assert str(tmp_path / "run") in printed


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--policy", "h3o"], "h3o"),
        (["--policy", "restkv:alpa=1"], "alpa"),
        (["--policy", "restkv:alpha=2"], "alpha"),
        (["--policy", "restkv:alpha=x"], "alpha"),
        (["--policy", "restkv:project=maybe"], "project"),
        (["--policy", "restkv:preset=best"], "best"),
        (["--policy", "restkv:window=4.5"], "window"),
        (["--policy", "lacache"], "lacache"),
        (["--budget", "32"], "budget"),
        (["--budget", "1.5"], "budget"),
        (["--budget", "99999999999"], "budget"),
        (["--max-length", "99999999"], "max-length"),
        # 40,960 less 64 of trec's answers and 256 of the chat template.
        (["--max-length", "40641"], "--max-length 40641: expected at most 40640"),
        (["--sets", "hotpotqa,nope"], "nope"),
        (["--model", "/does/not/exist"], "/does/not/exist"),
        (["--data", "/does/not/exist"], "/does/not/exist"),
        (["--limit", "0"], "limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, capsys, extra, culprit):
    out = tmp_path / "run"
    code = run(data, out, *extra)
    assert_refused(code, capsys.readouterr().err, culprit, out)


@pytest.mark.parametrize(
    ("asked", "context", "answer", "chat", "found"),
    [
        (None, 8192, 1200, True, 8192 - 1200 - TEMPLATE_ROOM),
        (None, 8192, 32, False, 8192 - 32 - 32),
        (8192 - 512 - TEMPLATE_ROOM, 8192, 512, True, 8192 - 512 - TEMPLATE_ROOM),
        (100, 8192, 512, True, 100),
        (None, None, 512, True, 4096),
        (10**6, None, 512, True, 10**6),
    ],
)
def test_prompts_leave_room_for_the_answer_and_the_template(asked, context, answer, chat, found):
    args = argparse.Namespace(max_length=asked)
    assert longest_text(args, context, answer=answer, chat=chat) == found


@pytest.mark.parametrize(
    ("asked", "context", "answer", "chat", "message"),
    [
        (8192, 8192, 1200, True, r"--max-length 8192: expected at most 6736: .* up to 1200 .* 256"),
        (7425, 8192, 512, True, r"--max-length 7425: expected at most 7424"),
        (8129, 8192, 32, False, r"--max-length 8129: expected at most 8128: .* up to 32$"),
        (None, 512, 256, True, r"--model: no room for a prompt: the model holds 512 tokens"),
        (16, 512, 241, True, r"--model: no room for a prompt"),
    ],
)
def test_lengths_without_that_room_are_refused(asked, context, answer, chat, message):
    args = argparse.Namespace(max_length=asked)
    with pytest.raises(UserError, match=message):
        longest_text(args, context, answer=answer, chat=chat)


def test_a_broken_line_is_named_before_anything_runs(data, tmp_path, capsys):
    broken = tmp_path / "data"
    broken.mkdir()
    good = (data / "trec.jsonl").read_text().splitlines()
    (broken / "trec.jsonl").write_text("\n".join([good[0], good[1][:-20]]) + "\n")
    assert run(broken, tmp_path / "run", "--sets", "trec") == 2
    error = capsys.readouterr().err
    assert "trec.jsonl" in error
    assert "2" in error
    assert not (tmp_path / "run").exists()


def test_policies_are_read_by_the_types_of_their_fields():
    text = "restkv:preset=paper,alpha=0.5,window=16,project=false"
    expected = RestKV(form="before", alpha=0.5, window=16, project=False)
    assert make_policy(parse_policy(text)) == expected
    assert make_policy(parse_policy("snapkv:pooling=maxpool,kernel=7")) == SnapKV(
        pooling="maxpool", kernel=7
    )
    assert make_policy(parse_policy("tova:recent=32,sinks=4")) == TOVA(recent=32, sinks=4)
    with pytest.raises(UserError, match="recent=many: expected a whole number"):
        make_policy(parse_policy("tova:recent=many"))


def test_options_of_the_cache_stand_among_those_of_the_policy():
    text = "snapkv:window=16,budget=0.25,heads=adakv,lists=2,storage=int8"
    plan = make_plan(parse_policy(text), Slots(128), headroom=8)
    assert plan == CachePlan(
        policy=SnapKV(window=16), budget=0.25, heads=AdaKV(lists=2), storage="int8", headroom=8
    )
    text = "tova:decode_budget=64,evict_every=1,layers=pyramid"
    plan = make_plan(parse_policy(text), Slots(128), headroom=8)
    assert plan == CachePlan(
        policy=TOVA(), budget=128, decode_budget=64, evict_every=1, layers="pyramid", headroom=8
    )
    wrong = {"heads=mine": "heads", "decode_budget=x": "decode_budget", "lists=2": "heads="}
    for text, culprit in wrong.items():
        with pytest.raises(UserError, match=culprit):
            make_plan(parse_policy(f"tova:{text}"), Slots(128), headroom=8)


def test_the_configuration_knows_all_of_a_plan():
    def describe(text, budget=128):
        return describe_plan(make_plan(parse_policy(text), Slots(budget), headroom=8))

    plain = describe("tova")
    assert plain == {"name": "tova", **dataclasses.asdict(TOVA()), "budget": 128}
    options = ("budget=0.5", "recent=2", "layers=pyramid", "storage=int8", "heads=adakv")
    options += ("heads=adakv,lists=2", "decode_budget=64", "decode_budget=64,evict_every=2")
    others = [describe(f"tova:{text}") for text in options]
    for i, other in enumerate(others):
        assert json.loads(json.dumps(other)) == other
        assert other not in [plain, *others[:i]]
    assert describe("full")["budget"] is None


def test_memory_is_checked_before_anything_is_allocated(monkeypatch):
    """8 TB of cache would be refused by shape alone."""
    from tests.restkv_jax import tiny

    plan = make_plan(parse_policy("restkv"), Slots(10**9), headroom=8)
    live = len(jax.live_arrays())
    with pytest.raises(UserError, match=r"--budget: .* do not fit"):
        engines.check_fit(tiny.make(), {"restkv": plan}, 128, 0)
    assert len(jax.live_arrays()) <= live + 16
