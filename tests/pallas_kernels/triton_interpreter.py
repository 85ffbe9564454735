"""Triton kernels on CPU, through Triton's own interpreter.

It wants arrays that look like PyTorch's, and its products take bfloat16 for integers, so float16
stands in. The interpreter must be chosen before a kernel is defined, so this runs as a program of
its own: `TRITON_INTERPRET=1 python -m tests.pallas_kernels.triton_interpreter` prints the largest
errors as JSON.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.tiling import Tiling
from tests.pallas_kernels.cases import CASES, expected, poisoned


class FakeTensor:
    """The little that the interpreter asks of a tensor, around a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size, device):
        return FakeTensor(np.empty(size, self.array.dtype))

    def set_(self, storage, offset, size, stride):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def copy_(self, other):
        self.array[...] = other.array


def run(inputs, options, tiling):
    """`decode_attention_triton` with the interpreter in the place of the custom call."""
    from pallas_kernels.decode_attention import kernel_gpu

    begin = jnp.asarray([options["start"] or 0], jnp.int32)
    static = {key: options[key] for key in ("scale", "softcap")}
    arrays, shapes, launch = kernel_gpu.launch(
        *inputs, begin, **static, weights=True, tiling=tiling
    )
    grid = launch.pop("grid")
    outputs = [np.full(x.shape, np.nan, x.dtype) for x in shapes]
    tensors = [FakeTensor(np.array(x)) for x in arrays]
    kernel_gpu.part_kernel[grid](*tensors, *map(FakeTensor, outputs), **launch)
    sums, peaks, totals, logits = map(jnp.asarray, outputs)
    numerators, total = kernel_gpu.softmax(logits)
    return kernel_gpu.combine(sums, peaks, totals), numerators / total


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    errors = {}
    for spec in CASES:
        tilings = {"own": None, "small": Tiling(block=16, splits=3)}
        for dtype in (jnp.float32, jnp.float16):
            for name, tiling in tilings.items():
                inputs = spec.inputs(dtype)
                ours = run(poisoned(spec, inputs), spec.options, tiling)
                theirs = expected(spec, inputs)
                errors[f"{spec.name} {dtype.__name__} {name}"] = [
                    float(np.max(np.abs(np.asarray(a, np.float64) - b)))
                    for a, b in zip(ours, theirs, strict=True)
                ]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
