"""The results folder: kills, resumption, foreign configurations, full disks."""

import errno
import json
import os

import pytest

from experiments.core import storage
from experiments.core.errors import UserError
from experiments.core.results import (
    ResultStore,
    differing_keys,
    fingerprint,
    folder_name,
)
from experiments.core.storage import RowFile, locked, write_atomic
from experiments.core.tasks import Row
from experiments.core.uncertainty import Average, summarise

CONFIG = {"model": "tiny", "budget": 8, "policies": {"full": {"alpha": "0.3"}}, "sets": ("a",)}
ROWS = [Row(input=str(i), context="c", answers=("é", "b"), length=2) for i in range(3)]


def test_row_file_appends_and_loads(tmp_path):
    file = RowFile(tmp_path / "new" / "rows.jsonl")
    assert file.load() == []
    file.append({"pred": "a\nb\u2028é"})
    file.append({"pred": "\ud800"})
    assert [row["pred"] for row in file.load()] == ["a\nb\u2028é", "\ud800"]
    assert file.path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"n": 1})
    good = file.path.read_bytes()
    file.append({"text": "some words"})
    os.truncate(file.path, len(file.path.read_bytes()) - cut)
    assert file.load() == [{"n": 1}]
    assert file.path.read_bytes() == good


def test_a_damaged_line_is_named(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    file.path.write_bytes(b'{"a": 1}\n\0\0\0\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: damaged"):
        file.load()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"n": 1})
    before = file.path.read_bytes()
    write = os.write
    left = [4]

    def write_until_full(descriptor, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(storage.os, "write", write_until_full)
    with pytest.raises(UserError, match="No space left on device; the rows before are safe"):
        file.append({"text": "too long for it"})
    assert file.path.read_bytes() == before


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")
    assert path.stat().st_mode & 0o600 == 0o600

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*result\.json: No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_one_writer_at_a_time(tmp_path):
    with (
        locked(tmp_path / "out"),
        pytest.raises(UserError, match="another process"),
        locked(tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "out"):
        pass
    # Nothing was written, so nothing is left.
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), locked(tmp_path / "file"):
        pass


def append(store, policy, index):
    store.write_meta({})
    store.append(policy, "a", ROWS[index], f"pred {index}", {"prefill_s": 0.1})


def test_a_store_resumes_where_it_was(tmp_path):
    with ResultStore.open(tmp_path, CONFIG) as store:
        assert store.done("full", "a", ROWS) == 0
        append(store, "full", 0)
        append(store, "full", 1)
    with ResultStore.open(tmp_path, dict(reversed(CONFIG.items()))) as store:
        assert store.done("full", "a", ROWS) == 2
        assert store.done("other", "a", ROWS) == 0
        append(store, "full", 2)
        rows = store.predictions("full", "a")
        assert [row["index"] for row in store.timings("full", "a")] == [0, 1, 2]
    assert [row["pred"] for row in rows] == ["pred 0", "pred 1", "pred 2"]
    assert list(rows[0])[:4] == ["pred", "answers", "all_classes", "length"]


def test_a_kill_between_timing_and_prediction(tmp_path):
    with ResultStore.open(tmp_path, CONFIG) as store:
        store.done("full", "a", ROWS)
        append(store, "full", 0)
    RowFile(tmp_path / "timing" / "full" / "a.jsonl").append({"index": 1, "prefill_s": 9.0})
    with ResultStore.open(tmp_path, CONFIG) as store:
        assert store.done("full", "a", ROWS) == 1
        assert len(store.timings("full", "a")) == 1
        append(store, "full", 1)
        assert [t["prefill_s"] for t in store.timings("full", "a")] == [0.1, 0.1]


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    with ResultStore.open(tmp_path, CONFIG) as store:
        store.write_meta({})
    other = {**CONFIG, "budget": 9, "policies": {"full": {"alpha": "0.4"}}}
    with (
        pytest.raises(UserError, match=r"differs in: budget, policies\.full\.alpha\)"),
        ResultStore.open(tmp_path, other),
    ):
        pass


def test_rows_of_other_data_are_refused(tmp_path):
    with ResultStore.open(tmp_path, CONFIG) as store:
        store.done("full", "a", ROWS)
        append(store, "full", 0)
    others = [Row(input="x", context="c", answers=("other",), length=2)]
    for rows in (others, []):
        with (
            pytest.raises(UserError, match=r"a\.jsonl, line 1: is not this run's row"),
            ResultStore.open(tmp_path, CONFIG) as store,
        ):
            store.done("full", "a", rows)


def test_lines_of_earlier_versions_may_lack_fields(tmp_path):
    def earlier(row, index, prediction):
        return {"pred": prediction, "answers": list(row.answers), "index": index}

    for record, counted in ((earlier, True), (lambda *_: {"answers": ["é", "b"]}, False)):
        folder = tmp_path / str(counted)
        with ResultStore.open(folder, CONFIG, record) as store:
            store.done("full", "a", ROWS)
            append(store, "full", 0)
        with ResultStore.open(folder, CONFIG) as store:
            if counted:
                assert store.done("full", "a", ROWS) == 1
            else:
                with pytest.raises(UserError, match="is not this run's row"):
                    store.done("full", "a", ROWS)


def test_damaged_or_missing_meta(tmp_path):
    with ResultStore.open(tmp_path, CONFIG) as store:
        store.done("full", "a", ROWS)
        append(store, "full", 0)
    meta = tmp_path / "run_meta.json"
    meta.write_text("{")
    with (
        pytest.raises(UserError, match=r"run_meta\.json: damaged"),
        ResultStore.open(tmp_path, CONFIG),
    ):
        pass
    meta.unlink()
    with (
        pytest.raises(UserError, match=r"no run_meta\.json"),
        ResultStore.open(tmp_path, CONFIG),
    ):
        pass


def test_write_result(tmp_path):
    scores = {"full": {"a": [0.0, 100.0, 50.0], "b": [100 / 3]}}
    averages = [Average("mean of sets", ("a", "b"))]
    with ResultStore.open(tmp_path, CONFIG) as store:
        result = store.write_result(scores, averages)
    assert result == summarise(scores, averages)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    official = json.loads((tmp_path / "pred" / "full" / "result.json").read_text())
    assert official == {"a": 50.0, "b": 33.33}


def test_prediction_files_in_another_format(tmp_path):
    def record(row, index, prediction):
        return {"index": index, "pred": prediction, "outputs": list(row.answers)}

    with ResultStore.open(tmp_path, CONFIG, record) as store:
        store.done("full", "8192/a", ROWS)
        store.write_meta({})
        store.append("full", "8192/a", ROWS[0], "x", {})
    path = tmp_path / "pred" / "full" / "8192" / "a.jsonl"
    assert json.loads(path.read_text()) == {"index": 0, "pred": "x", "outputs": ["é", "b"]}
    with ResultStore.open(tmp_path, CONFIG, record) as store:
        assert store.done("full", "8192/a", ROWS) == 1
    with (
        pytest.raises(UserError, match="is not this run's row"),
        ResultStore.open(tmp_path, CONFIG) as store,
    ):
        store.done("full", "8192/a", ROWS)


def test_names_and_fingerprints():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    name = folder_name("org/model: x", {"a": 1})
    assert name == f"org-model-x-{fingerprint({'a': 1})}"
    assert differing_keys({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 3}, "e": 3}) == [
        "a.c",
        "d",
        "e",
    ]
