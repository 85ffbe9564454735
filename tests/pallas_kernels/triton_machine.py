"""Triton kernels through Triton's compiler and ptxas, which need no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.triton_extra import aliased_outputs

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8", "int32": "i32"}


class Compiled(NamedTuple):
    name: str
    shared: int  # bytes of shared memory
    code: bytes
    assembly: str  # PTX


def machine_code(run, *inputs, folder, monkeypatch, capability=90) -> list[Compiled]:
    """What every launch of `run(*inputs, call=...)` becomes; the inputs are shapes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches: list[Any] = []

    def record(
        kernel,
        arrays,
        outputs,
        *,
        name,
        grid,
        zeroed=(),
        aliases=None,
        num_warps,
        num_stages,
        **static,
    ):
        pointers = {
            key: f"*{_TYPES[x.dtype.name]}"
            for key, x in zip(kernel.arg_names, (*arrays, *outputs), strict=False)
        }
        written = aliased_outputs(kernel, arrays, aliases)
        pointers = {key: kind for key, kind in pointers.items() if key not in written}
        static |= written
        source = ASTSource(
            fn=kernel,
            signature=pointers | dict.fromkeys(static, "constexpr"),
            constexprs=static,
            # As arrays begin, and as the custom call tells it.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        )
        # jax-triton asks for fused multiplications and additions as well.
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        launches.append((name, source, options))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    jax.eval_shape(lambda *arrays: run(*arrays, call=record), *inputs)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    found = []
    for name, source, options in launches:
        kernel = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        found.append(Compiled(name, kernel.metadata.shared, kernel.asm["cubin"], kernel.asm["ptx"]))
    return found
