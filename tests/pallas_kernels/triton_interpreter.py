"""Triton kernels on CPU, through Triton's own interpreter.

It wants arrays that look like PyTorch's, and it takes bfloat16 for integers, which is put right
here. The interpreter must be chosen before a kernel is defined, so this runs as a program of
its own: `TRITON_INTERPRET=1 python -m tests.pallas_kernels.triton_interpreter OP` prints the
largest errors as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.tiling import Tiling
from pallas_kernels.masked_eviction.specs import SPECS as EVICTIONS
from pallas_kernels.triton_extra import aliased_outputs
from pallas_kernels.window_scores.specs import SPECS as SCORES
from tests.pallas_kernels.cases import (
    APPENDED,
    CASES,
    appended,
    assert_written,
    expected,
    first_row_padded,
    poisoned,
)


def errors_of(op):
    """What the program prints of an op, by name of the case; for the tests."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.triton_interpreter", op]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(text.stdout)


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


def interpreted(kernel, inputs, outputs, *, name, grid, zeroed=(), aliases=None, **options):
    """In the place of `triton_call`; what is not written holds what is no result."""

    def launch(*arrays):
        fresh = [
            np.full(x.shape, 0 if i in zeroed else _unwritten(x.dtype), x.dtype)
            for i, x in enumerate(outputs)
        ]
        tensors = [FakeTensor(np.array(x)) for x in arrays]
        by_name = aliased_outputs(kernel, arrays, aliases)
        for i, output in (aliases or {}).items():
            fresh[output] = tensors[i].array
        given = [FakeTensor(x) for i, x in enumerate(fresh) if i not in (aliases or {}).values()]
        kernel[grid](*tensors, *given, **by_name, **options)
        return tuple(fresh)

    return jax.pure_callback(launch, tuple(outputs), *inputs)


def _unwritten(dtype):
    return np.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else np.nan


def hold_bfloat16():
    """Has the interpreter, which holds bfloat16 as integers, multiply and round what they mean."""
    from triton.runtime import interpreter

    language, builder = interpreter.tl, interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def wide(x):
        if x.data.dtype != np.uint16:
            return x
        numbers = x.data.view(jnp.bfloat16).astype(np.float32)
        return interpreter.TensorHandle(numbers, language.float32)

    def product(self, a, b, *rest):
        return create_dot(self, wide(a), wide(b), *rest)

    def cast(self, x, dtype):
        if dtype.scalar != language.bfloat16:
            return cast_impl(self, wide(x), dtype)
        held = wide(x).data.astype(jnp.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(held, language.bfloat16)

    builder.create_dot, builder.cast_impl = product, cast


def difference(ours, theirs):
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))


def decode_attention():
    from pallas_kernels.decode_attention.kernel_gpu import decode_attention_triton

    for spec in CASES:
        tilings = {"own": None, "small": Tiling(block=16, splits=3)}
        for dtype in (jnp.float32, jnp.bfloat16):
            for name, tiling in tilings.items():
                inputs = spec.inputs(dtype)
                run = jax.jit(
                    functools.partial(
                        decode_attention_triton,
                        **spec.options,
                        weights=True,
                        tiling=tiling,
                        call=interpreted,
                    )
                )
                case = f"{spec.name} {dtype.__name__} {name}"
                out, weights, _ = run(*poisoned(spec, inputs))
                yield case, list(map(difference, (out, weights), expected(spec, inputs)))
                if spec in APPENDED:
                    new = spec.new(dtype)
                    *ours, cache = run(*poisoned(spec, inputs, new), new)
                    theirs = expected(spec, appended(inputs, new))
                    assert_written(cache, poisoned(spec, inputs, new), new)
                    yield f"{case} appended", list(map(difference, ours, theirs))
                    inputs, new, unseen = first_row_padded(spec, dtype)
                    theirs = expected(spec, appended(inputs, new))
                    inputs = poisoned(spec, inputs, unseen)
                    *ours, cache = run(*inputs, unseen)
                    assert_written(cache, inputs, unseen)
                    yield f"{case} padded", list(map(difference, ours, theirs))


def masked_eviction():
    """Nothing but names: each case is checked here, entry by entry."""
    from pallas_kernels.masked_eviction import kernel_gpu
    from tests.pallas_kernels.test_masked_eviction import check, check_thresholds

    # Rows that one step of the search holds, and rows of several steps.
    for searched, dtype in ((kernel_gpu._SEARCHED, "bfloat16"), (128, "float32")):
        kernel_gpu._SEARCHED = searched
        thresholds = functools.partial(kernel_gpu.thresholds_triton, call=interpreted)
        check_thresholds(jax.jit(thresholds))
        if searched == 128:  # more steps than the counts of a step have room for
            check_thresholds(jax.jit(thresholds), columns=256 * searched)
        for spec in EVICTIONS:
            if not spec.large:
                run = functools.partial(
                    kernel_gpu.masked_eviction_triton, **spec.options, call=interpreted
                )
                check(spec, dtype, jax.jit(run))
                yield f"{spec.name} {dtype}", None


def window_scores():
    """Errors against the reference, and against float64 where one key has nearly all weight."""
    from pallas_kernels.window_scores.kernel_gpu import window_scores_triton
    from pallas_kernels.window_scores.reference import window_scores as reference
    from pallas_kernels.window_scores.tiling import Tiling
    from tests.pallas_kernels.test_window_scores import heavy_case

    several = Tiling(keys=32, parts=2, rows=16, scored=64, ranks=64)
    small = [spec for spec in SCORES if not spec.large]
    cases = [
        *((spec, jnp.float32, several) for spec in small),
        *((spec, jnp.bfloat16, None) for spec in small),
        *((spec, jnp.float16, None) for spec in small if spec.name in ("mha_64", "gqa8_128")),
    ]
    for spec, dtype, tiling in cases:
        q, k, v, factor, mean, queries, places = spec.inputs(dtype)
        unused = (jnp.broadcast_to(places, k.shape[:3]) < 0)[..., None]
        poisoned = [jnp.where(unused, jnp.nan, x).astype(dtype) for x in (k, v)]
        rest = factor, mean, queries, places
        run = functools.partial(
            window_scores_triton,
            log_sums=None,
            form=spec.form,
            tiling=tiling,
            call=interpreted,
        )
        theirs = jax.jit(functools.partial(reference, form=spec.form))(q, k, v, *rest)
        yield f"{spec.name} {dtype.__name__}", relative(jax.jit(run)(q, *poisoned, *rest), theirs)
    for kind in ("aggregated", "per_query"):
        for rest in (1e-5, 1e-7):
            args, form, theirs = heavy_case(kind, rest)
            run = functools.partial(
                window_scores_triton, log_sums=None, form=form, tiling=several, call=interpreted
            )
            yield f"heavy {kind} {rest}", relative(jax.jit(run)(*args), theirs)


def relative(ours, theirs):
    """Largest error over the score and a thousandth of the median; NaN if there is any."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    least = 1e-3 * np.median(theirs[theirs > 0.0])
    return float(np.max(np.abs(ours - theirs) / (theirs + least)))


OPS = {f.__name__: f for f in (decode_attention, masked_eviction, window_scores)}


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    hold_bfloat16()
    print(json.dumps(dict(OPS[sys.argv[1]]())))


if __name__ == "__main__":
    main()
