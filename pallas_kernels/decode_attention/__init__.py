"""Attention of one new token over masked cache slots, which it is written into."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.reference import (
    Entries,
    NewEntry,
    decode_attention_xla,
    visible,
)
from pallas_kernels.decode_attention.tiling import Tiling
from pallas_kernels.dispatch import Implementation, Kernel, dispatch
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import run_triton, without_triton

__all__ = ["Entries", "NewEntry", "Tiling", "decode_attention", "visible"]


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    positions: Int[Array, "B J T"],
    query: Int[Array, " B"],
    owners: Int[Array, "B J T"] | None = None,
    new: NewEntry | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sets: int = 1,
    start: int | Int[Array, ""] | None = None,
    start_multiple: int = 1,
    slots: int | None = None,
    weights: bool = False,
    implementation: Implementation | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None, Entries | None]:
    """softmax(scale · q kᵀ) v over the slots that a query sees; logits and sums in float32.

    The kernels read keys, values and positions once, 2·S·H numbers for each cache head whatever
    the number of query heads that share it, and write the outputs. New entries are written in the
    same pass: the softmax begins with them as they are given, and no slot is read that is written.
    In the products with `v` the unnormalised weights are rounded to the type of `q`, as in the
    reference. Derivatives are the reference's; no kernel has one of its own.

    Args:
        q: the new token's queries; query head n reads head n // (N / J) of the cache.
        k: cached keys; int8 ones are scaled after the products.
        v: cached values.
        positions: of the entries, -1 for an empty slot. A query sees those up to its own. Kernels
            let slots that no query sees hold anything, the reference any finite number.
        query: positions of the queries; a row with a negative one sees nothing and gives zeros.
        owners: of lists that several sets of entries share, the set of each entry; or None.
        new: entries to write first, at the positions of their queries; None if all are there. Not
            for lists that several sets share, each of which gets an entry.
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.
        window: how many positions a query sees, its own the last; None for all before it.
        sets: of entries in each list, see `owners`; as many query heads look at each.
        start: where the S slots begin, if the arrays hold those of many layers along axis 2.
            A kernel reads them where they are, if blocks of a fitting size divide the start;
            else they are copied first. None: all of them, S = T.
        start_multiple: static; divides a traced `start`.
        slots: S; given with `start`.
        weights: whether to return the softmax too, which costs B·N·S float32 numbers.
        implementation: None for the platform's best, see `dispatch`.
        tiling: of the implementation that is named; None to choose by shapes.

    Returns:
        The outputs; the weights of all slots in float32, or None; and the cache's arrays with the
        new entries in them, or None.

    Raises:
        ValueError: shapes that do not fit each other.
        NotImplementedError: the implementation that was named cannot run this, and why.
    """
    _check(q, k, v, positions, query, owners, new, sets, start, slots)
    if tiling is not None and implementation in (None, "xla"):
        raise ValueError(f"tiling: expected None for implementation {implementation!r}")
    if new is not None:
        stored = jax.tree.map(lambda x, y: x.astype(y.dtype), (new.k, new.v), (k, v))
        new = NewEntry(k=stored[0], v=stored[1], slot=new.slot)
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "sets": sets,
        "slots": slots,
        "weights": weights,
    }
    # A start that is known is static.
    traced: tuple[Array, ...] = ()
    if start is None or isinstance(start, int):
        options["start"] = start
    else:
        traced = (start,)

    def tpu(*args: Any) -> Any:
        from pallas_kernels.decode_attention.kernel_tpu import decode_attention_tpu

        return decode_attention_tpu(*args, **options, start_multiple=start_multiple, tiling=tiling)

    def triton(*args: Any) -> Any:
        kernel = run_triton("decode_attention", "decode_attention_triton")
        return kernel(*args, **options, tiling=tiling)

    refusal = _refusal(q, k)
    return dispatch(
        "decode_attention",
        implementation,
        q,
        k,
        v,
        positions,
        query,
        owners,
        new,
        *traced,
        reference=functools.partial(decode_attention_xla, **options),
        kernels=(
            Kernel("pallas_tpu", tpu, refusal=refusal),
            Kernel("triton", triton, refusal=refusal or without_triton("decode_attention")),
        ),
    )


def _check(
    q: Array,
    k: Array | QuantArray,
    v: Array | QuantArray,
    positions: Array,
    query: Array,
    owners: Array | None,
    new: NewEntry | None,
    sets: int,
    start: int | Array | None,
    slots: int | None,
) -> None:
    batch, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1]:
        raise ValueError(
            f"k: expected [{batch}, a divisor of {heads}, slots, {size}], got {k.shape}"
        )
    if v.shape != k.shape or isinstance(v, QuantArray) != isinstance(k, QuantArray):
        raise ValueError(f"v: expected what k is, {k.shape}, got {v.shape}")
    for name, marks in (("positions", positions), ("owners", owners)):
        if marks is not None and marks.shape != k.shape[:3]:
            raise ValueError(f"{name}: expected {k.shape[:3]} as k, got {marks.shape}")
    if query.shape != (batch,):
        raise ValueError(f"query: expected a position for each of {batch} rows, got {query.shape}")
    group = heads // k.shape[1]
    if group % sets or (sets > 1 and owners is None):
        raise ValueError(f"sets: expected 1, or a divisor of {group} and owners, got {sets}")
    if (start is None) != (slots is None) or (slots or 0) > k.shape[2]:
        raise ValueError(f"slots: expected up to {k.shape[2]}, with start {start}, got {slots}")
    if new is None:
        return
    entry = (*k.shape[:2], size)
    if owners is not None:
        raise ValueError("new: expected None for lists with owners")
    for name, x in (("new.k", new.k), ("new.v", new.v)):
        if x.shape != entry or isinstance(x, QuantArray) != isinstance(k, QuantArray):
            raise ValueError(f"{name}: expected {entry}, stored as k is, got {x.shape}")
    if new.slot.shape != (batch,):
        raise ValueError(f"new.slot: expected one for each of {batch} rows, got {new.slot.shape}")


def _refusal(q: Array, k: Array | QuantArray) -> str | None:
    stored = k.values if isinstance(k, QuantArray) else k
    for name, dtype in (("q", q.dtype), ("k", stored.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16, *([jnp.int8] if name == "k" else [])):
            return f"{name} is {dtype}, expected float32 or bfloat16 (or int8 with scales)"
    if not isinstance(k, QuantArray) and stored.dtype != q.dtype:
        return f"q is {q.dtype}, but k {stored.dtype}"
    return None
