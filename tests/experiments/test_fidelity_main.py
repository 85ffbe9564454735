"""The fidelity program as a user runs it, on a tiny checkpoint."""

from __future__ import annotations

import builtins
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.plots import heat_map, lines, require_matplotlib
from experiments.fidelity.__main__ import main
from experiments.fidelity.report import describe, summary_table
from restkv_jax.decode import Fidelity, measure_fidelity

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
ARGUMENTS = [
    *("--model", MODEL, "--sets", "few_shot", "--offline-rows", "1", "--offline-length", "512"),
    *("--max-length", "120", "--tokens", "4", "--oracle-window", "8", "--budget", "40"),
    *("--policy", "full", "--policy", "streaming", "--policy", "restkv"),
]


def size_of(png):
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_a_run_leaves_json_a_table_and_plots(tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(lambda: main([*ARGUMENTS, "--out", str(out)])) == 0
    printed = capsys.readouterr().out
    assert "difference from the full cache" in printed
    content = json.loads((out / "fidelity.json").read_text())
    assert list(content) == ["full", "streaming", "restkv"]
    full, evicted = content["full"], content["streaming"]
    assert full["summary"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert full["summary"]["top1"] == full["summary"]["overlap"] == 1.0
    assert evicted["summary"]["attention"] > 0.0
    assert np.asarray(evicted["attention_heads"]).ndim == 2
    assert len(evicted["residual"]) == len(evicted["attention"])
    assert (out / "table.md").read_text().count("|") > 20
    assert "qwen3_qknorm" in (out / "run_meta.json").read_text()
    names = {path.name for path in out.glob("*.png")}
    assert {"attention.png", "residual.png", "overlap.png"} <= names
    assert {"attention_heads-restkv.png", "overlap-restkv.png"} <= names
    assert all(min(size_of(path)) > 100 for path in out.glob("*.png"))
    assert run_main(lambda: main([*ARGUMENTS, "--tokens", "3", "--out", str(out)])) == 2
    assert "tokens" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_at_the_next_row(tmp_path, monkeypatch):
    arguments = [*ARGUMENTS, "--offline-rows", "2", "--no-plots", "--out", str(tmp_path)]
    assert main(arguments) == 0
    whole = (tmp_path / "fidelity.json").read_bytes()
    rows = tmp_path / "rows.jsonl"
    first, second = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(first + second[:100])  # killed while it wrote
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return measure_fidelity(*args, **options)

    monkeypatch.setattr("experiments.fidelity.__main__.measure_fidelity", counted)
    assert main(arguments) == 0
    assert len(calls) == 1
    assert rows.read_bytes() == first + second
    assert (tmp_path / "fidelity.json").read_bytes() == whole


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--policy", "h3o"], "h3o"),
        (["--tokens", "0"], "--tokens 0"),
        (["--max-length", "40701"], "--max-length 40701: expected at most 40700"),
        (["--budget", "8"], "budget"),
        (["--sets", "nope"], "nope"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, extra, culprit):
    assert run_main(lambda: main([*ARGUMENTS, *extra, "--out", str(tmp_path / "run")])) == 2
    error = capsys.readouterr().err
    assert culprit in error
    assert error.count("\n") == 1


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for word in ("W_O", "KL(full || evicted)", "leave-one-out", "--oracle-window", "fidelity.json"):
        assert word in printed


def test_without_matplotlib_one_line_says_what_to_do(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"restkv-jax\[plot\]"):
        require_matplotlib()
    assert run_main(lambda: main([*ARGUMENTS, "--out", str(tmp_path / "run")])) == 2
    assert "--no-plots" in capsys.readouterr().err


def found(**changes):
    row = np.asarray([[0.1, 0.3], [0.2, np.nan]])
    base = {
        "attention_heads": row[:, :, None].repeat(2, 2),
        "attention": row,
        "residual": None,
        "hidden": np.asarray([0.5, 0.7]),
        "kl": row,
        "top1": np.asarray([[1.0, 0.0], [1.0, np.nan]]),
        "overlap": np.full((2, 2, 1), np.nan),
    }
    return Fidelity(**(base | changes))


def test_what_is_not_there_is_null_and_a_dash():
    content = describe(found())
    assert content["n"] == 2
    assert content["residual"] is None
    assert content["overlap"] == [[None], [None]]
    assert content["summary"]["overlap"] is None
    assert content["attention"] == [0.15, 0.3]
    assert content["summary"]["kl"] == pytest.approx(0.2)
    assert content["summary"]["top1"] == pytest.approx(2 / 3, abs=1e-6)
    # Rows have means 0.2 and 0.2.
    assert content["standard_error"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert content["standard_error"]["hidden"] == pytest.approx(0.2 / math.sqrt(2) / math.sqrt(2))
    table = summary_table({"mine": found()})
    assert table.rows == (("mine", "0.2000", "-", "0.6000", "0.2000", "0.300", "66.7%", "-"),)


def test_the_same_values_draw_the_same_bytes(tmp_path):
    values = np.asarray([[0.0, 0.5, np.nan], [0.1, 0.2, 0.3]])
    for name in ("a", "b"):
        heat_map(tmp_path / f"{name}.png", values, title="t", label="error")
        lines(tmp_path / f"{name}-lines.png", {"x": values[1]}, title="t", label="error")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a-lines.png").read_bytes() == (tmp_path / "b-lines.png").read_bytes()
