"""The loop: one call per row, interruption and resumption."""

import contextlib
import io
import json

import pytest

from experiments.core.errors import UserError
from experiments.core.progress import RunProgress
from experiments.core.results import ResultStore
from experiments.core.runner import evaluate, generating, row_seed
from experiments.core.session import describe_sets, run_session
from experiments.core.storage import RowFile
from experiments.core.tasks import TaskSet
from experiments.longbench.metrics import score_prediction
from tests.experiments.fakes import CHAT, OFFICIAL, PLAIN, CharTokenizer, FakeEngine, row

POLICIES = ("full", "restkv")

SETS = [
    TaskSet(spec=CHAT, rows=tuple(row(i) for i in range(3)), source="here"),
    TaskSet(spec=PLAIN, rows=tuple(row(i) for i in range(2)), source="here"),
]


def test_row_seeds_differ():
    seeds = {row_seed(s, n, i) for s in (0, 1) for n in ("a", "b") for i in (0, 1)}
    assert len(seeds) == 8


def session(folder, engine, sets=SETS, changes=None, policies=None, most_together=None):
    policies = policies or POLICIES
    made = []

    def make_engine():
        made.append(1)
        return engine

    tables = run_session(
        folder=folder,
        config={
            "sets": describe_sets(sets),
            "policies": dict.fromkeys(policies),
            **(changes or {}),
        },
        environment={"python": "x"},
        title="a title",
        sets=sets,
        policies=policies,
        make_ask=lambda: generating(make_engine(), CharTokenizer(), OFFICIAL, 3),
        score=score_prediction,
        most_together=most_together,
        progress=RunProgress(io.StringIO()),
    )
    return tables, len(made)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run_meta.json", ".lock", "table.md")
    }


def test_one_call_serves_all_policies(tmp_path):
    engine = FakeEngine()
    tables, _ = session(tmp_path, engine)
    assert [policies for _, policies, _ in engine.calls] == [POLICIES] * 5
    assert tables[0].columns == ("set", "n", "full", "restkv")
    predictions = [
        json.loads(line) for line in (tmp_path / "pred/restkv/chat.jsonl").read_text().splitlines()
    ]
    assert [p["index"] for p in predictions] == [0, 1, 2]
    assert predictions[1]["answers"] == ["in 1", "é"]
    assert predictions[1]["pred"].startswith("bot:  é restkv")
    meta = json.loads((tmp_path / "run_meta.json").read_text())
    assert meta["finished"]
    assert len(meta["sessions"]) == 1
    assert meta["seconds"] >= 0
    assert meta["sessions"][0]["sources"] == {"chat": "here", "plain": "here"}
    assert meta["config"]["sets"]["chat"]["checksum"] == SETS[0].checksum
    assert "| chat | 3 |" in (tmp_path / "table.md").read_text()


def test_of_many_policies_only_differences_to_the_first_are_printed(tmp_path, monkeypatch):
    policies = tuple(f"p{i}" for i in range(7))
    monkeypatch.setattr(f"{__name__}.POLICIES", policies)
    *_, printed, _ = session(tmp_path, FakeEngine())[0]
    assert {row[1] for row in printed.rows} == {f"{policy} - p0" for policy in policies[1:]}
    assert "p6 - p5" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("rows", range(5))
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, rows, error):
    session(tmp_path / "whole", FakeEngine())
    with pytest.raises(error):
        session(tmp_path / "parts", FakeEngine(fail_after=rows, error=error))
    assert not (tmp_path / "parts" / "result.json").exists()
    assert not json.loads((tmp_path / "parts" / "run_meta.json").read_text())["finished"]
    rest = FakeEngine()
    session(tmp_path / "parts", rest)
    assert len(rest.calls) == 5 - rows
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    meta = json.loads((tmp_path / "parts" / "run_meta.json").read_text())
    assert meta["finished"]
    assert len(meta["sessions"]) == 2


def test_policies_that_come_later_are_asked_alone(tmp_path):
    """And a run that is stopped while they are asked goes on with each cohort as it was."""
    more = ("h2o", *POLICIES, "tova")
    for folder, stops in (("whole", [5]), ("parts", [2, 3])):
        with contextlib.suppress(KeyboardInterrupt):
            session(tmp_path / folder, FakeEngine(fail_after=stops[0]))
        asked = []
        for stop in (*stops[1:], None):
            engine = FakeEngine(fail_after=stop)
            with contextlib.suppress(KeyboardInterrupt):
                session(tmp_path / folder, engine, policies=more)
            asked += [policies for _, policies, _ in engine.calls]
        assert asked.count(("h2o", "tova")) == 5
        assert asked.count(POLICIES) == 5 - stops[0]
        assert len(asked) == 10 - stops[0]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert list(json.loads((tmp_path / "whole/result.json").read_text())["score"]) == list(more)
    # What is there already is not left out.
    with pytest.raises(UserError, match=r"differs in: policies\.h2o, policies\.tova"):
        session(tmp_path / "whole", None)
    with pytest.raises(UserError, match="differs in: seed"):
        session(tmp_path / "whole", None, policies=(*more, "snapkv"), changes={"seed": 4})


@pytest.mark.parametrize("stop", [None, 2, 7])
def test_of_many_policies_some_are_asked_all_rows_before_others(tmp_path, stop):
    many = (*POLICIES, "h2o", "tova", "knorm")
    session(tmp_path / "whole", FakeEngine(), policies=many)
    asked = []
    for fail_after in (stop, None)[stop is None :]:
        engine = FakeEngine(fail_after=fail_after)
        with contextlib.suppress(KeyboardInterrupt):
            session(tmp_path / "groups", engine, policies=many, most_together=2)
        asked += [policies for _, policies, _ in engine.calls]
    groups = [many[:2], many[2:4], many[4:]]
    first, second = (len(task.rows) for task in SETS)
    of_rows = [
        *(g for g in groups for _ in range(first)),
        *(g for g in groups for _ in range(second)),
    ]
    assert asked == of_rows
    assert files(tmp_path / "whole") == files(tmp_path / "groups")


def test_a_kill_in_the_middle_of_a_line_resumes_to_the_same_bytes(tmp_path):
    session(tmp_path / "whole", FakeEngine())
    for cut in (1, 30, 200):
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(KeyboardInterrupt):
            session(folder, FakeEngine(fail_after=3))
        # As if killed while the second policy's last row was being written.
        path = folder / "pred/restkv/chat.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        rest = FakeEngine()
        session(folder, rest)
        assert rest.calls[0][1] == POLICIES  # of the cut row, whose first policy stays as it is
        predictions = {k: v for k, v in files(folder).items() if not k.startswith("timing/")}
        assert predictions.items() <= files(tmp_path / "whole").items()


def test_a_finished_run_needs_no_engine(tmp_path):
    session(tmp_path, FakeEngine())
    before = files(tmp_path)
    _, made = session(tmp_path, None)
    assert made == 0
    assert files(tmp_path) == before


def test_another_configuration_is_refused_before_the_engine_is_built(tmp_path):
    session(tmp_path, FakeEngine())
    before = files(tmp_path)
    for changes in ({"seed": 4}, {"sets": describe_sets(SETS[:1])}):
        with pytest.raises(UserError, match="another configuration"):
            session(tmp_path, None, changes=changes)
    assert files(tmp_path) == before


def test_an_engine_that_refuses_leaves_nothing_behind(tmp_path):
    def refuse():
        raise UserError("--budget 7: too small")

    with pytest.raises(UserError, match="too small"):
        run_session(
            folder=tmp_path / "out",
            config={},
            environment={},
            title="",
            sets=SETS,
            policies=POLICIES,
            make_ask=refuse,
            score=score_prediction,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    session(tmp_path / "whole", FakeEngine())
    append, count = RowFile.append, [0]

    def append_until_full(self, data):
        count[0] += 1
        if count[0] > 6:
            raise UserError(f"cannot write {self.path}: No space left on device")
        append(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", append_until_full)
        with pytest.raises(UserError, match="No space"):
            session(tmp_path / "parts", FakeEngine())
    session(tmp_path / "parts", FakeEngine())
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_a_bar_counts_the_rows_of_every_cohort():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with RunProgress(stream) as progress:
        progress.start_set("chat", 3, [2, 1])
        for _ in range(3):
            progress.row_done()
        progress.end_set()
    assert "6/6" in stream.getvalue()


def test_progress_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    config = {"x": 1}
    progress = RunProgress(stream)

    def asked_by(engine):
        return generating(engine, CharTokenizer(), OFFICIAL, 0)

    with ResultStore.open(tmp_path, config) as store:
        store.write_meta({})
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(
                SETS[:1], [POLICIES], ask=asked_by(FakeEngine(2)), store=store, progress=progress
            )
    with ResultStore.open(tmp_path, config) as store:
        evaluate(SETS, [POLICIES], ask=asked_by(FakeEngine()), store=store, progress=progress)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("chat: 3 rows in ")
    assert lines[0].endswith("2 from an earlier run")
    assert lines[1].startswith("plain: 2 rows in ")
    assert lines[1].endswith(" s")
