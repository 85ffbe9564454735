r"""`python -m experiments.kernel_bench`: single ops against XLA and against the device's floor.

Times every implementation of an op that this platform has, on shapes that the tests share, and
checks what it timed, arrays that were written too, against the plain XLA form in float32. The floor
is the larger of the bytes that any implementation moves over the measured memory bandwidth and its
operations over the measured peak of matrix products; the fraction is how much of the time the
floor takes. It is above 100 % where the data of a small shape stays in a cache between rounds.

The implementation `projected` of window_scores is what the released code computes: plain XLA that
projects the values of every head to the model's width, [T, N x H], before it takes distances.

Examples:
  python -m experiments.kernel_bench
  python -m experiments.kernel_bench --op decode_attention --spec 8b_1024 --dtype bfloat16
  python -m experiments.kernel_bench --op window_scores --op masked_eviction --spec 8b_128k
  python -m experiments.kernel_bench --op window_scores --spec 8b_128k --dtype bfloat16 \
      --implementation triton --implementation xla --implementation projected
  python -m experiments.kernel_bench --large --out kernels.json
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from experiments.core.environment import environment
from experiments.core.errors import UserError, run_main
from experiments.core.measure import bytes_per_second, flops_per_second, state_loop_seconds
from experiments.core.options import Parser, count_of
from experiments.core.storage import dump_json, write_atomic
from experiments.core.table import TextTable, human_bytes, print_tables
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.specs import SPECS as DECODE_ATTENTION
from pallas_kernels.dispatch import Implementation
from pallas_kernels.masked_eviction import masked_eviction
from pallas_kernels.masked_eviction.specs import SPECS as MASKED_EVICTION
from pallas_kernels.window_scores import window_scores
from pallas_kernels.window_scores.specs import SPECS as WINDOW_SCORES


class Spec(Protocol):
    """Shapes of one call, see the `specs.py` of the ops."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def large(self) -> bool: ...  # noqa: D102
    @property
    def flops(self) -> int: ...  # noqa: D102
    def inputs(self, dtype: DTypeLike) -> tuple[Any, ...]: ...  # noqa: D102
    def read_bytes(self, dtype: DTypeLike) -> int: ...  # noqa: D102


Bound = Callable[..., tuple[Any, Any]]
Measured = Implementation | Literal["projected"]
_MEASURED = (*get_args(Implementation), "projected")


class Op(NamedTuple):
    """An op under test.

    Attributes:
        specs: its shapes.
        inputs: what it is given for a spec and a type.
        bind: the op with a spec's static arguments and an implementation: of the inputs, its result
            and the inputs of the next round.
    """

    specs: Sequence[Spec]
    inputs: Callable[[Any, DTypeLike], tuple[Any, ...]]
    bind: Callable[[Any, Any], Bound]


def _decode_attention_inputs(spec: Any, dtype: DTypeLike) -> tuple[Any, ...]:
    # Lists that several sets share are not written to.
    return *spec.inputs(dtype), spec.new(dtype) if spec.sets == 1 else None


def _decode_attention(spec: Any, implementation: Any) -> Bound:
    def run(q: Any, k: Any, v: Any, positions: Any, *rest: Any) -> tuple[Any, Any]:
        out, _, written = decode_attention(
            q, k, v, positions, *rest, **spec.options, implementation=implementation
        )
        return out, (q, *(written or (k, v, positions)), *rest)

    return run


def _unchanged(op: Callable[..., Any]) -> Bound:
    return lambda *args: (op(*args), args)


def _window_scores(spec: Any, implementation: Any) -> Bound:
    if implementation != "projected":
        return _unchanged(
            functools.partial(window_scores, form=spec.form, implementation=implementation)
        )

    def projected(q: Any, k: Any, v: Any, factor: Any, *rest: Any) -> Any:
        # To the model's width by as many copies as there are heads, which change no distance.
        copies = factor.shape[0]
        w_o = jnp.tile(factor * copies**-0.5, (1, 1, copies))
        return window_scores(q, k, v, w_o, *rest, form=spec.form, implementation="xla")

    return _unchanged(projected)


def _masked_eviction(spec: Any, implementation: Any) -> Bound:
    return _unchanged(
        functools.partial(masked_eviction, **spec.options, implementation=implementation)
    )


def _inputs(spec: Spec, dtype: DTypeLike) -> tuple[Any, ...]:
    return spec.inputs(dtype)


OPS = {
    "decode_attention": Op(DECODE_ATTENTION, _decode_attention_inputs, _decode_attention),
    "window_scores": Op(WINDOW_SCORES, _inputs, _window_scores),
    "masked_eviction": Op(MASKED_EVICTION, _inputs, _masked_eviction),
}

# Largest error relative to the largest number of the result.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Floor(NamedTuple):
    """What the device can do at best: bytes and operations a second."""

    bandwidth: float
    flops: float


def measure_floor(dtype: str) -> Floor:
    """By changing an array in place and by multiplying matrices, of sizes that fit the device."""
    device = jax.default_backend() != "cpu"
    return Floor(
        bytes_per_second(2**31 if device else 2**28),
        flops_per_second(8192 if device else 1024, dtype),
    )


def measure(
    op: Op, spec: Spec, dtype: str, implementation: Measured, floor: Floor, repeats: int
) -> dict[str, Any]:
    """One line of the result: times, floor and error; or why it did not run."""
    line: dict[str, Any] = {"spec": spec.name, "dtype": dtype, "implementation": implementation}
    if implementation == "projected" and op.specs is not WINDOW_SCORES:
        return {**line, "refused": "nothing is projected here"}
    inputs = op.inputs(spec, jnp.dtype(dtype))
    try:
        seconds, result = state_loop_seconds(
            op.bind(spec, implementation), *inputs, repeats=repeats
        )
    except NotImplementedError as refusal:
        return {**line, "refused": str(refusal)}
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in _leaves(inputs)]
    exact = jax.tree.unflatten(jax.tree.structure(inputs), exact)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(op.bind(spec, "xla"))(*exact)
    error = max(map(_error, _leaves(result), _leaves(expected)))
    by_bytes = spec.read_bytes(jnp.dtype(dtype)) / floor.bandwidth
    by_flops = spec.flops / floor.flops
    return {
        **line,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * max(by_bytes, by_flops),
        "bound": "bytes" if by_bytes > by_flops else "flops",
        "fraction": max(by_bytes, by_flops) / seconds,
        "error": error,
        "right": error <= _TOLERANCE[dtype],
    }


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _error(ours: Any, theirs: Any) -> float:
    if jnp.issubdtype(ours.dtype, jnp.integer):
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    a, b = (np.asarray(x).astype(np.float64) for x in (ours, theirs))
    if not (np.isfinite(a) == np.isfinite(b)).all():
        return float("inf")
    a, b = a[np.isfinite(b)], b[np.isfinite(b)]
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30))


def platform_implementations() -> tuple[Implementation, ...]:
    """Those that the default backend can run at all."""
    kernels: dict[str, tuple[Implementation, ...]] = {
        "tpu": ("pallas_tpu",),
        "gpu": ("pallas_gpu", "triton"),
    }
    return ("xla", *kernels.get(jax.default_backend(), ()))


def build_parser() -> Parser:
    """The program's command line."""
    parser = Parser(
        prog="python -m experiments.kernel_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", choices=OPS, help="repeat for several (all)")
    parser.add_argument("--spec", action="append", metavar="NAME", help="repeat for several")
    parser.add_argument(
        "--large", action="store_true", help="shapes of 8B models too (default on GPU and TPU)"
    )
    parser.add_argument("--dtype", action="append", choices=tuple(_TOLERANCE))
    parser.add_argument(
        "--implementation",
        action="append",
        choices=_MEASURED,
        help="repeat for several (default: all of the platform)",
    )
    parser.add_argument("--repeats", type=count_of("--repeats", 1), default=9, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes the figures as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0, or 1 if a result was wrong.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    chosen = _chosen(args)
    device = jax.devices()[0].device_kind
    results: dict[str, Any] = {"environment": environment(), "floor": {}, "ops": {}}
    for dtype in args.dtype or tuple(_TOLERANCE):
        floor = measure_floor(dtype)
        results["floor"][dtype] = floor._asdict()
        print(
            f"{device}, {dtype}: {human_bytes(floor.bandwidth)}/s of memory, "
            f"{floor.flops / 1e12:.2f} TFLOP/s of matrix products\n"
        )
        for name, found in chosen.items():
            lines = [
                measure(OPS[name], spec, dtype, implementation, floor, args.repeats)
                for spec in found
                for implementation in args.implementation or platform_implementations()
            ]
            results["ops"].setdefault(name, []).extend(lines)
            print_tables([table(f"{name}, {dtype}", lines)])
            for line in lines:
                if "refused" in line:
                    print(f"{line['spec']}, {line['implementation']}: {line['refused']}")
    if args.out is not None:
        write_atomic(args.out, dump_json(results))
    lines = [line for lines in results["ops"].values() for line in lines]
    return 0 if all(line.get("right", True) for line in lines) else 1


def _chosen(args: argparse.Namespace) -> dict[str, list[Spec]]:
    large = args.large or jax.default_backend() != "cpu"
    ops = args.op or list(OPS)
    known = {spec.name for name in ops for spec in OPS[name].specs}
    for name in args.spec or ():
        if name not in known:
            raise UserError(f"--spec {name}: expected one of {', '.join(sorted(known))}")
    wanted = {
        name: [
            spec
            for spec in OPS[name].specs
            if (spec.name in args.spec if args.spec else large or not spec.large)
        ]
        for name in ops
    }
    return {name: found for name, found in wanted.items() if found}


def table(title: str, lines: Sequence[dict[str, Any]]) -> TextTable:
    """Of lines that `measure` gave."""
    columns = ("spec", "implementation", "ms", "floor ms", "bound by", "fraction", "error")
    rows = []
    for line in lines:
        name = line["spec"], line["implementation"]
        if "refused" in line:
            rows.append((*name, "refused", *[""] * 4))
            continue
        error = f"{line['error']:.1e}" + ("" if line["right"] else " WRONG")
        times = f"{line['ms']:.4f}", f"{line['floor_ms']:.4f}"
        rows.append((*name, *times, line["bound"], f"{100 * line['fraction']:.0f} %", error))
    return TextTable(title, columns, tuple(rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
