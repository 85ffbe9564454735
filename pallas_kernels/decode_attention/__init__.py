"""Attention of one new token over masked cache slots."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.reference import decode_attention_xla
from pallas_kernels.decode_attention.tiling import Tiling
from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import run_triton, without_triton

__all__ = ["Tiling", "decode_attention"]


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    visible: Bool[Array, "B M S"],
    *,
    scale: float,
    softcap: float | None = None,
    start: int | Int[Array, ""] | None = None,
    start_multiple: int = 1,
    weights: bool = False,
    implementation: Implementation | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None]:
    """softmax(scale · q kᵀ) v over the visible slots; logits, softmax and sums in float32.

    The kernels read keys, values and marks once, 2·S·H numbers for each cache head whatever the
    number of query heads that share it, and write the outputs. In the products with `v` the
    unnormalised weights are rounded to the type of `q`, as in the reference. Its derivatives are
    the reference's; no kernel has one of its own.

    Writing the new token's keys and values is left to `write_slots`: it is one row for S rows read,
    in place, and every other user of the cache needs them written just so.

    Args:
        q: the new token's queries; query head n reads head n // (N / J) of the cache.
        k: cached keys, the new token's among them; int8 ones are scaled after the products.
        v: cached values.
        visible: True for slots that the query may look at, by cache head (M = J) or by query
            head (M = N). The others weigh 0. A row that sees nothing gives zeros. Kernels let
            slots that no query sees hold anything, the reference any finite number.
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.
        start: where the S slots begin, if `k` and `v` hold those of many layers along axis 2.
            A kernel reads them where they are, if blocks of a fitting size divide the start;
            else they are copied first. None: T = S.
        start_multiple: static; divides a traced `start`.
        weights: whether to return the softmax too, which costs B·N·S float32 numbers.
        implementation: None for the platform's best, see `dispatch`.
        tiling: of the implementation that is named; None to choose by shapes.

    Returns:
        The outputs, and the weights of all slots in float32, or None.

    Raises:
        ValueError: shapes that do not fit each other.
        NotImplementedError: the implementation that was named cannot run this, and why.
    """
    _check(q, k, v, visible, start)
    if tiling is not None and implementation in (None, "xla"):
        raise ValueError(f"tiling: expected None for implementation {implementation!r}")
    static: dict[str, Any] = {"scale": scale, "softcap": softcap, "weights": weights}
    traced: tuple[Array, ...] = ()
    if start is None or isinstance(start, int):
        static["start"] = start
    else:
        traced = (start,)

    def tpu(*args: Any) -> tuple[Array, Array | None]:
        from pallas_kernels.decode_attention.kernel_tpu import decode_attention_tpu

        return decode_attention_tpu(*args, **static, start_multiple=start_multiple, tiling=tiling)

    def triton(*args: Any) -> tuple[Array, Array | None]:
        kernel = run_triton("decode_attention", "decode_attention_triton")
        return kernel(*args, **static, tiling=tiling)

    return dispatch(
        "decode_attention",
        implementation,
        q,
        k,
        v,
        visible,
        *traced,
        reference=functools.partial(decode_attention_xla, **static),
        kernels=(
            Kernel("pallas_tpu", tpu, refusal=_refusal(q, k)),
            Kernel("triton", triton, refusal=_refusal(q, k) or without_triton("decode_attention")),
        ),
    )


def _check(
    q: Array,
    k: Array | QuantArray,
    v: Array | QuantArray,
    visible: Array,
    start: int | Array | None,
) -> None:
    batch, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1]:
        raise ValueError(
            f"k: expected [{batch}, a divisor of {heads}, slots, {size}], got {k.shape}"
        )
    if v.shape != k.shape or isinstance(v, QuantArray) != isinstance(k, QuantArray):
        raise ValueError(f"v: expected what k is, {k.shape}, got {v.shape}")
    slots = visible.shape[2]
    if visible.shape[:2] not in ((batch, k.shape[1]), (batch, heads)):
        raise ValueError(
            f"visible: expected [{batch}, {k.shape[1]} or {heads}, slots], got {visible.shape}"
        )
    if slots > k.shape[2] if start is not None else slots != k.shape[2]:
        raise ValueError(f"visible: {slots} slots, but k has {k.shape[2]}, start {start}")


def _refusal(q: Array, k: Array | QuantArray) -> str | None:
    stored = k.values if isinstance(k, QuantArray) else k
    for name, dtype in (("q", q.dtype), ("k", stored.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16, *([jnp.int8] if name == "k" else [])):
            return f"{name} is {dtype}, expected float32 or bfloat16 (or int8 with scales)"
    if not isinstance(k, QuantArray) and stored.dtype != q.dtype:
        return f"q is {q.dtype}, but k {stored.dtype}"
    return None
