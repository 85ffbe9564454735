"""Writes a model as an Orbax checkpoint: `python -m models.convert SRC DST`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError
from models.hf_write import to_hf
from models.huggingface import read_tokenizer
from models.orbax_folder import write_weights
from models.sources import resolve

# What `models.load` reads of a hub folder beside the weights.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SAMPLE = "A sample, 1234:\n  naïve 東京 <b>x</b>"


def convert(spec: str | Path, target: Path, *, dtype: str | None = None) -> None:
    """Writes the model `spec` into a new folder that `models.load` reads.

    Weights are read and written one after the other.

    Args:
        spec: as for `models.load`.
        target: the folder to make; nothing of it is left behind if that fails.
        dtype: of the stored weights, "float32" or "bfloat16"; None keeps what the checkpoint has
            (float32 of weights that are quantised).

    Raises:
        CheckpointError: the model cannot be had, or `target` exists or cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already")
    path = resolve(spec)
    checkpoint = open_checkpoint(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the final move is atomic: it stays on one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="convert-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            if path.is_dir():
                for name in _FILES:
                    if (path / name).exists():
                        shutil.copyfile(path / name, folder / name)
            else:
                _write_hub_files(folder, path, checkpoint)
            write_weights(folder, checkpoint.parameters, dtype and jnp.dtype(dtype))
            folder.rename(target)
    except OSError as err:
        raise CheckpointError(f"{target}: cannot be written ({err})") from err


def _write_hub_files(folder: Path, path: Path, checkpoint: Checkpoint) -> None:
    """Says in the hub's files what a GGUF file says in its metadata."""
    config = to_hf(checkpoint.parameters.config) | {"eos_token_id": list(checkpoint.eos_ids)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    checkpoint.tokenizer.save(folder)
    if read_tokenizer(folder).encode(_SAMPLE) != checkpoint.tokenizer.encode(_SAMPLE):
        raise CheckpointError(f"{path}: its tokenizer cannot be written as hub files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.convert", description=__doc__)
    parser.add_argument("src", help="a folder, a .gguf file, a hub id, or a small model's name")
    parser.add_argument("dst", type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the stored weights (default: as in SRC, float32 where that is quantised)",
    )
    given = parser.parse_args(arguments)
    try:
        convert(given.src, given.dst, dtype=given.dtype)
    except CheckpointError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"{given.dst}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
