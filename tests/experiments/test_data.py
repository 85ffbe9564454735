"""Reading LongBench files, and refusing broken ones."""

import gzip
import json
import os
import subprocess
import sys
import zipfile

import pytest

from experiments.core.errors import UserError
from experiments.longbench import data
from experiments.longbench.sets import LONGBENCH_SETS

ROW = {
    "input": "Who?",
    "context": "Some text.",
    "answers": ["He", "Him"],
    "length": 4,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "abc",
}
SPEC = LONGBENCH_SETS["hotpotqa"]


def line(**changes):
    return json.dumps({**ROW, **changes})


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(folder, *names, **options):
    return data.load_folder(folder, [LONGBENCH_SETS[n] for n in names], **options)


def test_reads_rows(tmp_path):
    write(tmp_path / "hotpotqa.jsonl", line(), "", line(_id=None, input="é"))
    (loaded,) = load(tmp_path, "hotpotqa", "qasper")
    assert loaded.source == "hotpotqa.jsonl"
    assert [row.input for row in loaded.rows] == ["Who?", "é"]
    assert loaded.rows[0].answers == ("He", "Him")
    assert loaded.rows[1].row_id is None


def test_gz_and_plain_files_have_the_same_checksum(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a" / "hotpotqa.jsonl", line())
    (tmp_path / "b" / "hotpotqa.jsonl.gz").write_bytes(gzip.compress(line().encode()))
    (a,), (b,) = load(tmp_path / "a", "hotpotqa"), load(tmp_path / "b", "hotpotqa")
    assert a.checksum == b.checksum


def test_limit_keeps_the_first_rows_but_checks_all(tmp_path):
    path = write(tmp_path / "hotpotqa.jsonl", line(input="1"), line(input="2"))
    (loaded,) = load(tmp_path, "hotpotqa", limit=1)
    assert [row.input for row in loaded.rows] == ["1"]
    write(path, line(), "{")
    with pytest.raises(UserError, match="line 2"):
        load(tmp_path, "hotpotqa", limit=1)


def test_which_file_is_taken(tmp_path):
    order = [
        f"hotpotqa{middle}{zipped}"
        for middle in (".jsonl", ".sample.jsonl", ".short.jsonl", "_e.jsonl")
        for zipped in ("", ".gz")
    ]
    for name in reversed(order):
        (tmp_path / name).touch()
        assert data.find_file(tmp_path, "hotpotqa").name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (line(answers=[]), "'answers'"),
        (line(answers="He"), "'answers'"),
        (line(answers=[1]), "'answers'"),
        (line(input=None), "'input'"),
        (line(context=3), "'context'"),
        (line(context=" "), "'context' is empty"),
        (line(length="4"), "'length'"),
        (line(length=True), "'length'"),
        (line(all_classes="x"), "'all_classes'"),
        (line(_id=7), "'_id'"),
        *[
            (json.dumps({k: v for k, v in ROW.items() if k != field}), f"'{field}' is missing")
            for field in ("input", "context", "answers", "length")
        ],
    ],
)
def test_a_broken_line_is_named_with_file_number_and_field(tmp_path, text, message):
    write(tmp_path / "hotpotqa.jsonl", line(), text, line())
    with pytest.raises(UserError, match=r"hotpotqa\.jsonl, line 2: ") as error:
        load(tmp_path, "hotpotqa")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_scored_are_refused_before_the_run(tmp_path):
    write(tmp_path / "trec.jsonl", line())
    with pytest.raises(UserError, match="line 1: field 'all_classes'"):
        load(tmp_path, "trec")
    write(tmp_path / "passage_retrieval_en.jsonl", line())
    with pytest.raises(UserError, match="line 1: field 'answers' names no paragraph"):
        load(tmp_path, "passage_retrieval_en")


def test_broken_files(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_bytes(line().encode() + b'\n{"input": "\xff"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load(tmp_path, "hotpotqa")
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="holds no rows"):
        load(tmp_path, "hotpotqa")
    path.unlink()
    packed = gzip.compress(line().encode())
    for content in (packed[:-4], b"plain", packed[:12] + b"xx" + packed[14:]):
        (tmp_path / "hotpotqa.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"hotpotqa\.jsonl\.gz: cannot be read"):
            load(tmp_path, "hotpotqa")


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere", "hotpotqa")
    with pytest.raises(UserError, match="no LongBench file"):
        load(tmp_path, "hotpotqa")
    write(tmp_path / "hotpotqa.jsonl", line())
    with pytest.raises(UserError, match="no file for set qasper"):
        load(tmp_path, "hotpotqa", "qasper", explicit=True)


def test_hub_archive(tmp_path, monkeypatch):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", line() + "\n" + line() + "\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(path))
    (loaded,) = data.load_hub([SPEC], limit=1)
    assert len(loaded.rows) == 1
    with pytest.raises(UserError, match=r"holds no qasper\.jsonl"):
        data.load_hub([LONGBENCH_SETS["qasper"]])
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="is damaged"):
        data.load_hub([SPEC])


def test_hub_without_network_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match="cannot download") as error:
        data.load_hub([SPEC])
    assert "\n" not in str(error.value)
    assert "--data offline" in str(error.value)


def test_the_hub_can_be_asked_by_a_fresh_process(tmp_path):
    """The client imports its parts when they are first used, so what other tests import hides."""
    code = (
        "from experiments.core.files import fetch_hub_file\n"
        "fetch_hub_file('owner/name', 'file', instead='use a folder')"
    )
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: --data hub: cannot download file of owner/name" in last
    assert "offline, use a folder" in last
