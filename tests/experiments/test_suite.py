"""`python -m experiments.suite` as a user runs it, on a tiny checkpoint."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest

from experiments.core import engine as engines
from experiments.core.errors import UserError, run_main
from experiments.core.options import parse_policy
from experiments.core.plans import make_plan
from experiments.infinitebench.tasks import TASKS as INFINITEBENCH
from experiments.longbench.offline import OFFLINE_SETS
from experiments.needle.haystack import MAX_NEW_TOKENS
from experiments.suite.__main__ import main
from experiments.suite.cli import model_folders
from experiments.suite.page import render
from experiments.suite.parts import PARTS, parts_of
from restkv_jax.decode import bucket_length

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
FOLDER = "qwen3_qknorm"


def run(out, *extra):
    arguments = ["--quick", "--model", MODEL, "--out", str(out), "--parts", "ruler,needle,fidelity"]
    return run_main(lambda: main([*arguments, *extra]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "run"
    assert run(out) == 0
    return out


@pytest.fixture
def report(finished):
    return json.loads((finished / "suite.json").read_text())


class Page(HTMLParser):
    """Captions and rows of all tables, and every attribute that may load something."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.tags, self._inside = [], [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self._inside = tag
        if tag == "table":
            self._table = []
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")

    def handle_data(self, data):
        if self._inside == "caption":
            self._caption += data
        elif self._inside in ("th", "td"):
            self._table[-1][-1] += data

    def handle_endtag(self, tag):
        self._inside = None
        if tag == "table":
            self.tables.append((self._caption, self._table))


def test_the_page_needs_nothing_else(finished, report):
    text = (finished / "report.html").read_text()
    assert not re.search(r"https?://|//[a-z]|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    pictures = [value for value in page.loads if not value.startswith("#")]
    figures = [path for part in report["models"][0]["parts"] for path in part["figures"]]
    assert len(pictures) == len(figures) >= 10
    for picture, path in zip(pictures, figures, strict=True):
        head, _, data = picture.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == (finished / path).read_bytes()
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert {value[1:] for value in page.loads if value.startswith("#")} <= ids


def test_tables_show_the_numbers_of_the_benchmarks(finished, report):
    shown = Page((finished / "report.html").read_text()).tables
    parts = {part["name"]: part for part in report["models"][0]["parts"]}
    assert list(parts) == ["ruler", "needle", "fidelity"]
    in_json = [table for part in parts.values() for table in part["tables"]]
    assert shown == [(table["title"], [table["columns"], *table["rows"]]) for table in in_json]
    first = {name: shown[in_json.index(part["tables"][0])][1] for name, part in parts.items()}

    for name in ("ruler", "needle"):
        result = json.loads((finished / FOLDER / name / "result.json").read_text())
        assert parts[name]["results"]["result.json"] == result
        columns, *rows = first[name]
        for row in rows[: len(result["n"]["full"])]:
            for policy, cell in zip(columns[2:], row[2:], strict=True):
                assert cell.split(" ± ")[0] == f"{result['score'][policy][row[0]]:.2f}"
    measured = json.loads((finished / FOLDER / "fidelity/fidelity.json").read_text())
    columns, *rows = first["fidelity"]
    for row in rows:
        assert row[columns.index("KL")] == f"{measured[row[0]]['summary']['kl']:.4f}"


def test_the_curve_is_score_over_bytes_by_budget(finished, report):
    ruler = report["models"][0]["parts"][0]
    result = ruler["results"]["result.json"]
    assert list(ruler["curve"]) == ["full", "streaming", "restkv"]
    for family, points in ruler["curve"].items():
        labels = [family] if family == "full" else [f"{family}+budget={b}" for b in (64, 256)]
        assert [point["policy"] for point in points] == labels
        for point in points:
            rows = [
                json.loads(line)["cache_bytes"]
                for path in (finished / FOLDER / "ruler/timing" / point["policy"]).rglob("*.jsonl")
                for line in path.read_text().splitlines()
            ]
            assert point["bytes"] == pytest.approx(np.mean(rows), abs=0.1)
            (average,) = result["averages"].values()
            assert point["score"] == average["score"][point["policy"]]
    small, large = ruler["curve"]["restkv"]
    # 4 layers, 2 heads of 32, keys and values in float32 and a position a slot
    assert large["bytes"] - small["bytes"] == (256 - 64) * 4 * 2 * (2 * 32 * 4 + 4)


def test_a_finished_run_asks_nothing_and_an_interrupted_one_what_is_left(
    finished, monkeypatch, capsys
):
    asked = []
    original = engines.EvictionEngine.answer

    def counted(self, *args, **kwargs):
        asked.append(kwargs["policies"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(engines.EvictionEngine, "answer", counted)
    monkeypatch.setattr("experiments.fidelity.__main__.measure_fidelity", None)
    page = (finished / "report.html").read_bytes()
    assert run(finished) == 0
    assert asked == []
    assert (finished / "report.html").read_bytes() == page

    before = json.loads((finished / "suite.json").read_text())["models"][0]["parts"][1]["results"]
    row = finished / FOLDER / "needle/pred/streaming/384.jsonl"
    row.write_bytes(row.read_bytes().splitlines(keepends=True)[0])
    assert run(finished) == 0
    assert asked == [["full", "streaming", "restkv"]]  # together, as they were
    after = json.loads((finished / "suite.json").read_text())["models"][0]["parts"][1]["results"]
    assert after == before

    capsys.readouterr()
    assert run(finished, "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    ran = []

    def part(name, error):
        def run_part(arguments):
            ran.append(name)
            if error:
                raise UserError(error)
            folder = Path(arguments[arguments.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "table.md").write_text("**t <1>**\n\n| a |\n| --- |\n| x & y |\n")

        monkeypatch.setattr(f"experiments.{name}.__main__.main", run_part)

    part("longbench", "--data: no <b>words</b>\nhere")
    part("perplexity", "")
    out = tmp_path / "run"
    code = run(out, "--parts", "longbench,perplexity", "--no-plots", "--model", "other/M2")
    assert code == 2
    assert ran == ["longbench", "perplexity"] * 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 parts were not run: qwen3_qknorm/longbench: --data: no <b>words</b> here" in error
    page = (out / "report.html").read_text()
    assert page.count("Not run: --data: no &lt;b&gt;words&lt;/b&gt; here") == 2
    assert "<b>" not in page
    assert Page(page).tables == [("t <1>", [["a"], ["x & y"]])] * 2


def test_a_part_without_its_extra_is_left_out(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    out = tmp_path / "run"
    assert run(out, "--parts", "lm_eval", "--no-plots") == 0
    assert "needs lm_eval" in (out / "report.html").read_text()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_the_selections_are_valid_command_lines(name, quick):
    (part,) = parts_of((name,), quick=quick)
    parser = importlib.import_module(f"experiments.{name}.cli").build_parser()
    policies = [text for policy in part.policies for text in ("--policy", policy)]
    args = parser.parse_args(["--model", "m", *part.options, *policies])
    labels = [policy.label for policy in args.policy]
    assert sorted(label for of in part.families().values() for label in of) == sorted(labels)
    for policy in args.policy:
        make_plan(policy, args.budget, headroom=0)
    if not part.curve:
        assert list(part.families()) == labels
    assert parse_policy(part.policies[0]).name == "full"


def test_parts_share_programs():
    """The same policies and budget, room for answers, and columns that prompts are padded to."""

    def shape(name, answer, lengths="--lengths"):
        (part,) = parts_of((name,), quick=False)
        options = dict(itertools.pairwise(part.options))
        room = answer(options)
        # A length is that of the prompt, or with the answer: a program serves both.
        columns = {
            bucket_length(columns)
            for length in map(int, options[lengths].split(","))
            for columns in (length, length - room)
        }
        return part.policies, options["--budget"], room, columns

    def longest(options):
        tasks = options["--tasks"].split(",")
        return max(INFINITEBENCH[task].max_new_tokens for task in tasks)

    offline = max(spec.max_new_tokens for spec in OFFLINE_SETS.values())
    first = shape("longbench", lambda _: offline, "--offline-length")
    assert len(first[-1]) == 1
    assert shape("needle", lambda _: MAX_NEW_TOKENS) == first
    assert shape("fidelity", lambda options: int(options["--tokens"]), "--offline-length") == first
    second = shape("infinitebench", longest)
    assert len(second[-1]) == 1
    assert shape("humaneval", lambda options: int(options["--max-new-tokens"])) == second


def test_models_have_folders_of_their_own():
    assert list(model_folders(None)) == ["smollm2-135m-instruct", "gemma-3-270m"]
    assert model_folders(["a/B", "c.gguf"]) == {"b": "a/B", "c.gguf": "c.gguf"}
    with pytest.raises(UserError, match=r"--model x/b.*a/B"):
        model_folders(["a/B", "x/b"])
    with pytest.raises(UserError, match="expected a name"):
        model_folders([".."])


def test_a_report_that_lacks_something_is_not_rendered(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="models"):
        render({"quick": True, "environment": {}}, tmp_path)


def test_bad_options_are_one_line(tmp_path, capsys):
    assert run(tmp_path / "run", "--parts", "glue") == 2
    error = capsys.readouterr().err
    assert "unknown part 'glue'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
