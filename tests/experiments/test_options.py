"""Options, errors and the LongBench command line."""

import json
import sys

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.options import (
    DTYPES,
    PolicyText,
    Ratio,
    Slots,
    chosen_policies,
    parse_budget,
    parse_policy,
)
from experiments.longbench.cli import build_parser, load_sets
from experiments.longbench.offline import OFFLINE_SETS


def count_words(text):
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("full", "full", ()),
        (" restkv ", "restkv", ()),
        ("restkv:b=2,a=x", "restkv", (("a", "x"), ("b", "2"))),
        ("restkv: alpha = 0.3 ", "restkv", (("alpha", "0.3"),)),
        ("x:k=a=b", "x", (("k", "a=b"),)),
    ],
)
def test_parse_policy(text, name, options):
    assert parse_policy(text) == PolicyText(name, options)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "NAME"),
        ("1x", "NAME"),
        ("a b", "NAME"),
        ("restkv:", "key=value"),
        ("restkv:alpha", "'alpha'"),
        ("restkv:alpha=", "'alpha='"),
        ("restkv:=3", "'=3'"),
        ("restkv:a=1,,b=2", "''"),
        ("restkv:a=1,a=2", "a is given twice"),
    ],
)
def test_malformed_policies_are_named(text, culprit):
    with pytest.raises(UserError) as error:
        parse_policy(text)
    assert culprit in str(error.value)
    assert repr(text) in str(error.value)


def test_labels():
    assert parse_policy("restkv:b=2,a=x/y").label == "restkv+a=x_y+b=2"
    assert [p.label for p in chosen_policies(None)] == ["full", "streaming", "snapkv", "restkv"]
    with pytest.raises(UserError, match="given twice"):
        chosen_policies([parse_policy("Full"), parse_policy("full")])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("128", Slots(128)),
        ("1", Slots(1)),
        ("0.2", Ratio(0.2)),
        ("1.0", Ratio(1.0)),
        (".5", Ratio(0.5)),
    ],
)
def test_parse_budget(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "nan", "inf", "x", "", "12a", "²"])
def test_bad_budgets_are_named(text):
    with pytest.raises(UserError, match="--budget"):
        parse_budget(text)


def test_defaults_and_values():
    args = build_parser().parse_args([])
    assert (args.data, args.budget, args.protocol, args.prompts) == (
        "offline",
        Slots(128),
        "official",
        "own",
    )
    assert args.policy is None
    assert args.out is None
    assert args.limit is None
    args = build_parser().parse_args(
        [
            "--policy",
            "full",
            "--policy",
            "restkv:a=1",
            "--budget",
            "0.2",
            "--limit",
            "3",
            "--seed",
            "7",
        ]
    )
    assert [p.label for p in args.policy] == ["full", "restkv+a=1"]
    assert (args.budget, args.limit, args.seed) == (Ratio(0.2), 3, 7)


@pytest.mark.parametrize(
    "line",
    [
        "--limit 0",
        "--limit x",
        "--seed -1",
        "--max-length 3",
        "--dtype int4",
        "--protocol mine",
        "--prompts mine",
        "--policy a:b",
        "--budget 2.0",
        "--nonsense",
        "--lim 3 extra",
        "--offline-length 1",
    ],
)
def test_bad_options_are_one_line_and_exit_2(line, capsys):
    def main():
        build_parser().parse_args(line.split())

    assert run_main(main) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line.split()[0] in err or line.split()[-1] in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "--policy restkv:alpha=0.5", "goes on at the next row", "offline"):
        assert word in text


def test_run_main(capsys):
    def fail():
        raise UserError("the culprit\n  is here")

    def interrupt():
        raise KeyboardInterrupt

    assert run_main(lambda: None) == 0
    assert run_main(lambda: 3) == 3
    assert run_main(fail) == 2
    assert run_main(interrupt) == 130
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "error: the culprit is here"
    assert "same command" in err[1]
    assert len(err) == 2


def load(*line, folder=None):
    args = build_parser().parse_args([*line, *(["--data", str(folder)] if folder else [])])
    return load_sets(args, count_words)


def test_the_offline_suite_is_never_called_longbench():
    sets, title = load("--sets", "few_shot,kv_needle", "--limit", "1", "--offline-length", "500")
    assert [task.spec.name for task in sets] == ["few_shot", "kv_needle"]
    assert [len(task.rows) for task in sets] == [1, 1]
    assert "not LongBench" in title
    assert all(name in OFFLINE_SETS for name in ("few_shot", "kv_needle"))


def test_longbench_rows_with_both_prompts(tmp_path):
    line = json.dumps({"input": "q", "context": "c", "answers": ["a"], "length": 1})
    (tmp_path / "hotpotqa.jsonl").write_text(line + "\n")
    sets, title = load(folder=tmp_path)
    assert [task.spec.name for task in sets] == ["hotpotqa"]
    assert title.startswith("LongBench (official protocol, own wordings)")
    pytest.importorskip("lm_eval")
    official, title = load("--prompts", "official", folder=tmp_path)
    assert official[0].spec.prompt != sets[0].spec.prompt
    assert "official wordings" in title


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sets nothing", "unknown set 'nothing'"),
        ("--sets few_shot,few_shot", "few_shot is given twice"),
        ("--sets hotpotqa", "unknown set 'hotpotqa'"),
        ("--prompts official", "no official prompts"),
        ("--data /no/such/folder", "no such folder"),
        ("--data /no/such/folder --sets kv_needle", "unknown set 'kv_needle'"),
    ],
)
def test_sets_that_do_not_exist(line, message):
    with pytest.raises(UserError, match=message):
        load(*line.split())


def test_weights_come_as_models_have_them():
    import models

    assert DTYPES == models.DTYPES


def test_nothing_here_imports_the_model_stack():
    import subprocess

    code = (
        "import sys, experiments.longbench.cli, experiments.core.session\n"
        "print([m for m in ('jax', 'lm_eval', 'rouge', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
