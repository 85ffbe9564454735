"""A reader of GGUF files: metadata and (quantised) tensors.

The reader in the `gguf` package builds a NumPy view per metadata element, which takes half a
minute on a large vocabulary; this one takes a fraction of a second. The package still does the
dequantisation.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from models.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Metadata value type -> NumPy dtype; little-endian, as are all files of these versions here.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    shape: tuple[int, ...]  # row-major: the last axis is contiguous and the quantised one
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFStore:
    """A `models.weights.TensorStore` over a GGUF file, memory-mapped.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, or a list of one of them.
        shapes: name -> shape of each tensor.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, or of an unknown version or
            quantisation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as err:
            raise CheckpointError(f"{path}: cannot be read ({err})") from err
        self._at = 0
        try:
            self.metadata, self._tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, ValueError) as err:
            raise CheckpointError(f"{path}: not a whole GGUF file ({err})") from err
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32."""
        tensor = self._tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.start)
        try:
            if tensor.kind == GGMLQuantizationType.F32:
                return raw.view("<f4").reshape(tensor.shape)
            if tensor.kind == GGMLQuantizationType.F16:
                return raw.view("<f2").reshape(tensor.shape)
            rows = raw.reshape(*tensor.shape[:-1], -1)
            return dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as err:
            raise CheckpointError(
                f"{self.path}: {name} has the unsupported quantisation {tensor.kind.name}"
            ) from err

    def _read_header(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"starts with {self._data[: len(_MAGIC)]!r}, not {_MAGIC!r}")
        self._at = len(_MAGIC)
        (version,) = self._unpack("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, supported are {_VERSIONS}")
        num_tensors, num_keys = self._unpack("<QQ")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(*self._unpack("<I"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = math.ceil(self._at / alignment) * alignment
        tensors = {}
        for name, tensor in infos:
            start = data_start + tensor.start
            if start + tensor.num_bytes > len(self._data):
                raise ValueError(f"{name} runs past the end of the file")
            tensors[name] = dataclasses.replace(tensor, start=start)
        return metadata, tensors

    def _tensor_info(self) -> tuple[str, _Tensor]:
        """A tensor's description; `start` still counts from the start of the data."""
        name = self._string()
        (num_dims,) = self._unpack("<I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"{name} has {num_dims} axes")
        shape = self._unpack(f"<{num_dims}Q")[::-1]
        kind_number, start = self._unpack("<IQ")
        kind = GGMLQuantizationType(kind_number)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_size:
            raise ValueError(f"{name} of shape {list(shape)} does not divide into {kind.name}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        return name, _Tensor(shape=shape, kind=kind, start=start, num_bytes=num_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._unpack("<IQ")
            if item_kind == _STRING:
                return [self._string() for _ in range(count)]
            return self._scalars(item_kind, count).tolist()
        return self._scalars(kind, 1).item()

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(dtype.itemsize * count), dtype)

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        return self._take(length).decode("utf-8")

    def _unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _take(self, num_bytes: int) -> bytes:
        taken = self._data[self._at : self._at + num_bytes]
        if len(taken) != num_bytes:
            raise ValueError("cut short")
        self._at += num_bytes
        return taken
