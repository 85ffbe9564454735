"""Kernels through jax-triton, an optional extra: whether there are any, and how they are called."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.varying import vary_like

_WITHOUT_GPU = 90


@functools.cache
def kernels_of(op: str) -> ModuleType | str:
    """The module with an op's Triton kernels, or why it cannot be imported."""
    try:
        importlib.import_module("jax_triton")
        return importlib.import_module(f"pallas_kernels.{op}.kernel_gpu")
    except (ImportError, AttributeError) as error:  # AttributeError: versions that do not fit
        return f"jax-triton cannot be imported ({error}); pip install 'restkv-jax[gpu]'"


def without_triton(op: str) -> str | None:
    """Why an op has no Triton kernels here, or None."""
    found = kernels_of(op)
    return found if isinstance(found, str) else None


def run_triton(op: str, function: str) -> Callable[..., Any]:
    """A function of the module of an op's kernels; there must be one."""
    found = kernels_of(op)
    assert isinstance(found, ModuleType)
    return getattr(found, function)


def triton_call(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    zeroed: Sequence[int] = (),
    aliases: Mapping[int, int] | None = None,
    compute_capability: int | None = None,
    **options: Any,
) -> tuple[Array, ...]:
    """Launches a kernel on GPU.

    Args:
        kernel: a `triton.jit` function of pointers to the inputs, then to the outputs, then of
            the static arguments.
        inputs: arrays.
        outputs: shapes and types of what it writes.
        name: in profiles.
        zeroed: which of the outputs hold zeros when it starts.
        aliases: which inputs are written to, and the outputs that this makes of them. The kernel
            uses their pointers; it has parameters for these outputs, which it must not use.
        compute_capability: that it is compiled for. None asks the GPU; a program that is lowered
            on a host without one is for 90, which H100 and H200 have.
        options: grid, num_warps, num_stages and the static arguments by name.
    """
    import jax_triton as jt

    by_version: dict[str, Any] = {"out_shape": tuple(outputs)}
    if "out_type" in inspect.signature(jt.triton_call).parameters:  # jax-triton 0.4
        # Fused multiplications and additions are what earlier versions have by themselves.
        by_version = {
            "out_type": tuple(outputs),
            "backend_options": {"enable_fp_fusion": True},
            # It passes what is written to once.
            **aliased_outputs(kernel, inputs, aliases),
        }
    if compute_capability is None and jax.default_backend() != "gpu":
        compute_capability = _WITHOUT_GPU

    def call(*arrays: Array) -> tuple[Array, ...]:
        found = jt.triton_call(
            *arrays,
            kernel=kernel,
            **by_version,
            name=name,
            zeroed_outputs=tuple(zeroed),
            input_output_aliases=dict(aliases or {}),
            compute_capability=compute_capability,
            **options,
        )
        return tuple(found)

    # The custom call has no rule of its own for `vmap`.
    return vary_like(tuple(jax.custom_batching.sequential_vmap(call)(*inputs)), inputs)


def aliased_outputs(
    kernel: Any, inputs: Sequence[Array], aliases: Mapping[int, int] | None
) -> dict[str, None]:
    """None for each of a kernel's parameters that is an output written to as an input."""
    return {kernel.arg_names[len(inputs) + i]: None for i in (aliases or {}).values()}
