"""`python -m experiments.ruler` as a user runs it, on a tiny checkpoint and made-up texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from experiments.core import engine as engines
from experiments.core.errors import UserError, run_main
from experiments.core.options import parse_lengths
from experiments.ruler.__main__ import main
from experiments.ruler.cli import build_parser, parse_tasks
from tests.experiments.programs import assert_refused, interrupted_after
from tests.experiments.ruler_data import write_folder

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
POLICIES = ("full", "streaming", "restkv")
SETS = ("1024/vt", "1024/fwe", "1024/qa_1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def run(data, out, *extra, policies=POLICIES):
    arguments = ["--model", MODEL, "--data", str(data), "--out", str(out), "--budget", "48"]
    arguments += ["--tasks", "vt,fwe,qa_1", "--rows", "2"]
    for policy in policies:
        arguments += ["--policy", policy]
    return run_main(lambda: main([*arguments, *extra]))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert run(data, out) == 0
    return out


def files(folder):
    names = [*sorted(folder.glob("pred/**/*.json*")), folder / "result.json"]
    return {str(name.relative_to(folder)): name.read_bytes() for name in names}


def test_predictions_are_in_the_official_layout_and_format(whole):
    for policy in POLICIES:
        for name in SETS:
            lines = (whole / "pred" / policy / f"{name}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert [row["index"] for row in rows] == [0, 1]
            for row in rows:
                assert isinstance(row["pred"], str)
                assert row["outputs"]
                assert row["truncation"] == -1
                assert row["length"] <= 1024
                others = row["others"]
                assert others.keys() == {"task", "length", "seed", "depths"}
                assert f"{others['length']}/{others['task']}" == name


def test_summaries_are_as_the_official_scorer_writes_them(whole):
    result = json.loads((whole / "result.json").read_text())
    for policy in POLICIES:
        lines = (whole / f"pred/{policy}/1024/summary.csv").read_text().splitlines()
        rows = [line.split(",") for line in lines]
        assert rows[0] == ["0", "1", "2", "3"]
        assert rows[1] == ["Tasks", "vt", "fwe", "qa_1"]
        scores = [float(cell) for cell in rows[2][1:]]
        assert scores == [result["score"][policy][name] for name in SETS]
        assert rows[3][0] == "Nulls"
        assert all(cell.endswith("/2") for cell in rows[3][1:])


def test_prompts_are_as_long_as_asked_by_the_models_own_tokenizer(whole):
    for name, new in (("vt", 30), ("fwe", 50), ("qa_1", 32)):
        lines = (whole / f"timing/full/1024/{name}.jsonl").read_text().splitlines()
        for line in lines:
            timing = json.loads(line)
            assert 1024 - 16 < timing["prompt_tokens"] + new <= 1024
            assert timing["kept_slots"] == timing["prompt_tokens"]
            assert timing["new_tokens"] <= new


def test_results_have_averages_errors_and_paired_differences(whole):
    result = json.loads((whole / "result.json").read_text())
    assert set(result["score"]["restkv"]) == set(SETS)
    assert result["n"]["full"] == dict.fromkeys(SETS, 2)
    (average,) = result["averages"]
    assert average == "1024: mean of these 3 tasks"
    pairs = [(pair["policy"], pair["against"]) for pair in result["paired"]]
    assert pairs == [("streaming", "full"), ("restkv", "full"), ("restkv", "streaming")]
    for pair in result["paired"]:
        assert set(pair["sets"]) == set(SETS)
        entry = pair["averages"][average]
        scores = result["averages"][average]["score"]
        expected = scores[pair["policy"]] - scores[pair["against"]]
        assert entry["difference"] == pytest.approx(expected, abs=0.011)
        assert entry["low"] is entry["high"] is None  # two rows
    table = (whole / "table.md").read_text()
    assert "paired differences" in table
    assert "restkv - streaming" in table


def test_an_interrupted_run_goes_on_and_ends_the_same(whole, data, tmp_path, capsys):
    out = tmp_path / "run"
    with interrupted_after(3):
        assert run(data, out) == 130
    assert "resume" in capsys.readouterr().err
    assert run(data, out) == 0
    assert files(out) == files(whole)


def test_another_seed_or_template_never_reuses_rows(whole, data, capsys):
    before = files(whole)
    for extra, culprit in ((["--seed", "1"], "seed"), (["--template", "none"], "template")):
        assert run(data, whole, *extra) == 2
        assert culprit in capsys.readouterr().err
    assert files(whole) == before


@pytest.fixture(scope="module")
def agnostic(data, tmp_path_factory):
    """A run of `fwe` whose contexts are compressed first, and what the engine did in it."""
    out, prefilled, fed = tmp_path_factory.mktemp("out") / "agnostic", [], []
    prefill, extend = engines.prefill, engines.extend

    def watched_prefill(model, tokens, valid, *, plans):
        logits, caches = prefill(model, tokens, valid, plans=plans)
        if isinstance(tokens, np.ndarray):  # not when shapes alone are traced
            prefilled.append((tokens[valid].tolist(), [c.kept_positions(0) for c in caches]))
        return logits, caches

    def watched_extend(model, cache, tokens, valid):
        fed.append((tokens[valid].tolist(), cache.kept_positions(0)))
        return extend(model, cache, tokens, valid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "prefill", watched_prefill)
        patch.setattr(engines, "extend", watched_extend)
        extra = ["--query-agnostic", "--tasks", "fwe"]
        assert run(data, out, *extra, policies=("full", "streaming")) == 0
    return out, prefilled, fed


def lines_of(folder, policy):
    text = (folder / policy / "1024" / "fwe.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_full_cache_answers_the_same_when_the_question_comes_later(whole, agnostic):
    out, _, _ = agnostic
    assert lines_of(out / "pred", "full") == lines_of(whole / "pred", "full")


def test_contexts_are_compressed_without_their_questions(whole, agnostic):
    out, prefilled, fed = agnostic
    tokenizer = models.load(MODEL).tokenizer
    rows = lines_of(out / "pred", "full")
    assert len(prefilled) == 2
    assert len(fed) == 4
    for i, (row, (context, caches)) in enumerate(zip(rows, prefilled, strict=True)):
        shown = tokenizer.decode(context, skip_special=False)
        assert all(word in shown for word in row["outputs"])
        assert "Which 3 code words" not in shown
        # Full and evicted cache in turn, each as it was without the question.
        for kept, (question, before) in zip(caches, fed[2 * i : 2 * i + 2], strict=True):
            asked = tokenizer.decode(question, skip_special=False)
            assert row["input"] in asked
            assert asked.endswith("that occur most often are:")
            np.testing.assert_array_equal(before, kept)
        aware = lines_of(whole / "timing", "streaming")[i]
        blind = lines_of(out / "timing", "streaming")[i]
        assert aware["prompt_tokens"] == blind["prompt_tokens"] == len(context) + len(question)
        assert aware["context_tokens"] == aware["prompt_tokens"]
        assert blind["context_tokens"] == len(context)
        assert aware["kept_slots"] == blind["kept_slots"] == 48
        assert lines_of(out / "timing", "full")[i]["kept_slots"] == len(context)
    assert "query-agnostic" in (out / "table.md").read_text()
    assert "query-aware" in (whole / "table.md").read_text()


def test_the_two_modes_never_share_a_folder(whole, data, capsys):
    assert run(data, whole, "--query-agnostic") == 2
    assert "query_agnostic" in capsys.readouterr().err


def test_what_is_left_out_is_said_before_the_run(data, tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path)
    (folder / "squad_made_up.jsonl").unlink()
    ran = []
    monkeypatch.setattr(
        "experiments.ruler.__main__.run_benchmark", lambda *a: ran.append(a[-1]) or 0
    )
    arguments = ["--model", MODEL, "--data", str(folder), "--rows", "1", "--lengths", "2k"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "left out: qa_1" in printed
    (benchmark,) = ran
    assert len(benchmark.sets) == 12
    assert [average.name for average in benchmark.averages] == [
        "2048: average of the 11 tasks without QA"
    ]
    assert "RULER" in benchmark.title


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--lengths", "128k"], "the model holds 40960"),
        (["--lengths", "100"], "--lengths 100"),
        (["--lengths", "4k,4096"], "given twice"),
        (["--tasks", "niah"], "unknown task 'niah'"),
        (["--tasks", "vt,vt"], "vt is given twice"),
        (["--data", "/does/not/exist"], "/does/not/exist"),
        (["--policy", "h3o"], "h3o"),
        (["--budget", "99999999999"], "budget"),
        (["--template", "mine"], "--template"),
        (["--rows", "0"], "--rows"),
        (["--max-length", "100"], "max-length"),
        (["--tasks", "niah_multikey_3", "--lengths", "256"], "niah_multikey_3"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, capsys, extra, culprit):
    out = tmp_path / "run"
    code = run(data, out, *extra)
    assert_refused(code, capsys.readouterr().err, culprit, out)


def test_options():
    args = build_parser().parse_args([])
    assert (args.data, args.tasks, args.lengths, args.rows) == ("offline", None, (1024,), 5)
    assert parse_lengths("512, 4K,131072") == (512, 4096, 131_072)
    assert parse_tasks("vt, qa_1") == ("vt", "qa_1")
    for text in ("", "4m", "-1", "4k,", "1e4"):
        with pytest.raises(UserError, match="--lengths"):
            parse_lengths(text)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for word in ("examples:", "--lengths 4k,8k", "niah_multikey_3", "goes on at the next row"):
        assert word in " ".join(text.split())


def test_the_command_line_does_not_wait_for_the_model_stack():
    code = (
        "import sys, experiments.ruler.cli\n"
        "print([m for m in ('jax', 'models', 'huggingface_hub', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
