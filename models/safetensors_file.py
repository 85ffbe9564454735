"""The tensors of a hub checkpoint: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.errors import CheckpointError
from models.weights import raise_problems

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}


class SafetensorsStore:
    """A `models.weights.TensorStore` over a checkpoint folder; files are memory-mapped.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        CheckpointError: a file is missing, damaged, outside the folder or not what the index
            says, or a tensor is of another type than float32, float16 or bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[np.ndarray, str, int, int]] = {}
        if (folder / _SINGLE).exists():
            self._add(folder / _SINGLE, wanted=None)
        elif (folder / _INDEX).exists():
            for file, names in _read_index(folder).items():
                self._add(folder / file, wanted=names)
        else:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            unsafe = f"; {', '.join(pickles)} may run code when read: not opened" if pickles else ""
            raise CheckpointError(f"{folder}: no {_SINGLE} and no {_INDEX}{unsafe}")

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype it is stored in: a view of the mapped file, not a copy."""
        data, dtype, start, end = self._places[name]
        return data[start:end].view(_DTYPES[dtype]).reshape(self.shapes[name])

    def _add(self, path: Path, wanted: set[str] | None) -> None:
        """Takes in the tensors of one file; `wanted` are those that the index puts there."""
        if not path.is_file():
            raise CheckpointError(f"{path}: named by {_INDEX}, but missing")
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: not a whole safetensors file ({err})") from err
        data, header = _map(path)
        problems = []
        names = set(file.keys())
        if wanted is not None:
            problems += [f"{name} missing, named by {_INDEX}" for name in sorted(wanted - names)]
            problems += [f"{name} not named by {_INDEX}" for name in sorted(names - wanted)]
        for name in sorted(names):
            part = file.get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            self._places[name] = (data, part.get_dtype(), *header[name]["data_offsets"])
            if part.get_dtype() not in _DTYPES:
                problems.append(f"{name} has dtype {part.get_dtype()}: not one of {tuple(_DTYPES)}")
        raise_problems(path, problems)


def _map(path: Path) -> tuple[np.ndarray, Mapping[str, Any]]:
    """The data of a file that was found whole, as bytes, and its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return np.memmap(path, np.uint8, "r", offset=8 + size), header


def _read_index(folder: Path) -> Mapping[str, set[str]]:
    """Shard file -> names of its tensors."""
    path = folder / _INDEX
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A path could lead out of the folder, and no checkpoint needs one.
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: {file!r} is not the name of a file in this folder")
        shards.setdefault(file, set()).add(name)
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: missing") from err
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path}: not JSON ({err})") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
