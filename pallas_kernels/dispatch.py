"""Which implementation of an op runs: by platform and shapes when it is lowered, or by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

# How `implementation=` names them: plain XLA, Pallas through Mosaic on TPU, Pallas on GPU, a Triton
# kernel through jax-triton on GPU, and what comes with JAX: splash attention on TPU, cuDNN on GPU.
Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "triton", "splash", "cudnn"]

_PLATFORMS = {
    "pallas_tpu": "tpu",
    "pallas_gpu": "cuda",
    "triton": "cuda",
    "splash": "tpu",
    "cudnn": "cuda",
}
_PLATFORM_OF_BACKEND = {"tpu": "tpu", "gpu": "cuda"}


class Kernel(NamedTuple):
    """One implementation of an op for one platform.

    Attributes:
        name: what `implementation` calls it.
        run: the op; it takes and returns what the reference does.
        refusal: why it cannot run with these arguments or on this installation; None if it can.
    """

    name: Implementation
    run: Callable[..., Any]
    refusal: str | None = None


def dispatch(
    op: str,
    implementation: Implementation | None,
    *args: Any,
    reference: Callable[..., Any],
    kernels: tuple[Kernel, ...],
) -> Any:
    """Runs an op where and how it should run.

    With `implementation` None each platform gets its first kernel that refuses nothing, and the
    reference where there is none. The platform is the one that the program is lowered for, not
    the one it is traced on: a program exported on a CPU host holds the right kernel, and a program
    for CPU holds the reference alone.

    Kernels cannot be split by XLA's partitioner. On a mesh they run inside `jax.shard_map` over
    every axis that has more than one device, as `restkv_jax.sharding.ShardedLM` does it; where
    such an axis of the mesh in context is left to the partitioner, the reference runs. A mesh
    that only the arguments know of is not seen here: Mosaic then refuses to compile and names
    `shard_map`.

    Kernels know no 64-bit types: they are traced without `jax_enable_x64`, int64 arguments become
    int32, and where one is float64 the reference runs.

    Derivatives are those of the reference, whatever ran.

    Args:
        op: its name, for messages.
        implementation: a name, or None to choose.
        args: arrays or pytrees of them; everything else is bound in `reference` and `run`.
        reference: the op in plain XLA.
        kernels: the others, the better ones of a platform first.

    Raises:
        ValueError: `implementation` is no such name.
        NotImplementedError: the implementation that was named cannot run this, and why.
    """
    names = ("xla", *_PLATFORMS)
    if implementation is not None and implementation not in names:
        raise ValueError(f"implementation: expected None or one of {names}, got {implementation!r}")
    args = jax.tree.map(_narrow, args)
    if implementation == "xla":
        return reference(*args)
    unfit = _partitioned_axes() or _wide(args)
    if implementation is not None:
        refusals = {kernel.name: kernel.refusal or unfit for kernel in kernels}
        reason = refusals.get(implementation, "there is no such kernel")
        if reason is not None:
            raise NotImplementedError(f"{op}: implementation {implementation!r}: {reason}")
        (run,) = (kernel.run for kernel in kernels if kernel.name == implementation)
        return with_derivatives_of(reference, _in_32_bits(run))(*args)
    by_platform: dict[str, Callable[..., Any]] = {}
    for kernel in () if unfit else kernels:
        if kernel.refusal is None:
            run = with_derivatives_of(reference, _in_32_bits(kernel.run))
            by_platform.setdefault(_PLATFORMS[kernel.name], run)
        elif _PLATFORMS[kernel.name] == _PLATFORM_OF_BACKEND.get(jax.default_backend()):
            _log_once(f"{op}: {kernel.name} is not used: {kernel.refusal}")
    if not by_platform:
        return reference(*args)
    return jax.lax.platform_dependent(*args, default=reference, **by_platform)


def _partitioned_axes() -> str | None:
    """Why no kernel may run here: axes of the mesh in context that are not split by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = [name for name, size, kind in sizes if size > 1 and kind != AxisType.Manual]
    return (
        f"the mesh axes {axes} are split by XLA, which cannot split a kernel; call it inside "
        "jax.shard_map over them"
        if axes
        else None
    )


def _narrow(x: Array) -> Array:
    return x.astype(jnp.int32) if x.dtype == jnp.int64 else x


def _wide(args: Any) -> str | None:
    """Why no kernel may run on these arguments: one is float64."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(args))
    return "an array is float64, which no kernel knows" if wide else None


def with_derivatives_of(
    reference: Callable[..., Any], run: Callable[..., Any]
) -> Callable[..., Any]:
    """`run`, with the derivatives of another function of the same arguments and results."""
    op = jax.custom_jvp(run)

    @op.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        return op(*primals), jax.jvp(reference, primals, tangents)[1]

    return op


def _in_32_bits(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` without `jax_enable_x64`, under which the indices in a kernel would be int64."""

    def narrow(*args: Any) -> Any:
        with jax.enable_x64(False):
            return run(*args)

    return narrow


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
