"""The Pallas kernel of `decode_attention` for TPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.slot_write.kernel_tpu import with_entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What the kernel is compiled for.

    Attributes:
        scale: factor on the products of queries and keys.
        softcap: of the logits, or None.
        quantized: keys and values are of int8.
        weights: the logits are wanted.
        appended: rows may have a new entry.
        total: T.
        tile: slots of a tile of keys and values.
        marks: slots of a tile of positions and scales.
    """

    scale: float
    softcap: float | None
    quantized: bool
    weights: bool
    appended: bool
    total: int
    tile: int
    marks: int

    def bounded(self, logits: Array) -> Array:
        """Through the soft cap."""
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


class _New(NamedTuple):
    """A row's new entry: references, and where it goes."""

    form: Form
    row: Any
    head: Any
    query: Any  # its position, negative for padding
    slot: Any  # T or more for none
    place: Any  # of the slot in the block that was read
    # Inputs.
    own_refs: list[Any]  # key and value [1, 1, 1, H]
    scale_refs: list[Any]  # of int8, two [1, 1, 1, 1]
    mark_refs: list[Any]  # position, and scales of int8, [1, J, 1]
    old_refs: list[Any]  # their tiles [1, J, marks]
    # Outputs.
    cache_refs: list[Any]  # two [B, J, T, H], where they are
    new_refs: list[Any]  # tiles [1, J, marks]
    # Scratch.
    tile_refs: list[Any]  # two [1, tile, H]
    semaphores: Any

    @property
    def exists(self) -> Any:
        return self.slot < self.form.total

    def is_in(self, block: int) -> Any:
        """Whether the slot is in the block that was read."""
        return self.exists & (self.place >= 0) & (self.place < block)

    def attended(self, q: Array) -> tuple[Array, Array]:
        """Logits [G, 1], and the value [1, H]; -inf and 0 if there is none, or for padding."""
        key, value = (ref[0, 0].astype(jnp.float32) for ref in self.own_refs)
        products = q.astype(jnp.float32) * key
        logits = self.form.scale * jnp.sum(products, axis=1, keepdims=True)
        if self.scale_refs:
            k_scale, v_scale = self.scale_refs
            logits, value = logits * k_scale[0, 0], value * v_scale[0, 0]
        seen = self.exists & (self.query >= 0)
        logits = jnp.where(seen, self.form.bounded(logits), -math.inf)
        return logits, jnp.where(seen, value, 0.0)

    def into_tiles(self, *block_refs: Any) -> None:
        """Puts key and value into their tiles of the block that was read."""
        tile = self.form.tile
        rows = pl.ds(pl.multiple_of(self.place // tile * tile, tile), tile)
        for tile_ref, block_ref, ref in zip(self.tile_refs, block_refs, self.own_refs, strict=True):
            tile_ref[...] = with_entry(block_ref[0, :, rows], ref[0], self.place % tile)

    def copies(self) -> list[Any]:
        """Of the tiles to where they are in the cache."""
        tile = self.form.tile
        rows = pl.ds(pl.multiple_of(self.slot // tile * tile, tile), tile)
        head = pl.ds(self.head, 1)
        return [
            pltpu.make_async_copy(ref, cache.at[self.row, head, rows], self.semaphores.at[i])
            for i, (ref, cache) in enumerate(zip(self.tile_refs, self.cache_refs, strict=True))
        ]

    def mark(self) -> None:
        """Puts position and scales into their tiles; all others are as they were."""
        at = jnp.where(self.exists, self.slot % self.form.marks, -1)
        for ref, old_ref, new_ref in zip(self.mark_refs, self.old_refs, self.new_refs, strict=True):
            new_ref[0] = with_entry(old_ref[0], ref[0], at)


def attend_kernel(
    # Prefetched.
    start_ref: Any,  # [1] the layer's first block
    query_ref: Any,  # [B] positions of the queries
    slot_ref: Any,  # [B] where new entries go
    # Inputs.
    q_ref: Any,  # [1, 1, G, H]
    k_ref: Any,  # [1, 1, block, H]
    v_ref: Any,  # [1, 1, block, H]
    seen_ref: Any,  # [1, 1, 1, 1 or G, block] int8
    *refs: Any,  # of int8: k_scale_ref and v_scale_ref [1, 1, 1, 1, block]; then those of `_New`
    # Outputs: out_ref [1, 1, G, H]; with weights, logits_ref [1, 1, 1, G, block]; those of `_New`.
    # Scratch: sum_ref [G, H], peak_ref [G, 1], total_ref [G, 1]; that of `_New`.
    # Static.
    form: Form,
) -> None:
    """One block of one cache head's slots."""
    rest = iter(refs)

    def take(count: int) -> list[Any]:
        return list(itertools.islice(rest, count))

    some, marks = 2 * form.appended, (1 + 2 * form.quantized) * form.appended
    scale_refs = take(2 * form.quantized)
    own_refs, own_scales = take(some), take(some * form.quantized)
    mark_refs, old_refs = take(marks), take(marks)
    (out_ref,), logits_ref = take(1), take(form.weights)
    cache_refs, new_refs = take(some), take(marks)
    sum_ref, peak_ref, total_ref = take(3)
    row, head, step = (pl.program_id(axis) for axis in range(3))
    block = k_ref.shape[2]
    q = q_ref[0, 0]
    new = None
    if form.appended:
        slot = slot_ref[row]
        tile_refs, (semaphores,) = take(2), take(1)
        new = _New(
            form=form,
            row=row,
            head=head,
            query=query_ref[row],
            slot=slot,
            place=slot - (start_ref[0] + step) * block,
            own_refs=own_refs,
            scale_refs=own_scales,
            mark_refs=mark_refs,
            old_refs=old_refs,
            cache_refs=cache_refs,
            new_refs=new_refs,
            tile_refs=tile_refs,
            semaphores=semaphores,
        )

    @pl.when(step == 0)
    def init() -> None:
        if new is None:
            sum_ref[...] = jnp.zeros_like(sum_ref)
            peak_ref[...] = jnp.full_like(peak_ref, -math.inf)
            total_ref[...] = jnp.zeros_like(total_ref)
        else:
            # The softmax begins with the new entry, as it is given.
            logits, value = new.attended(q)
            sum_ref[...] = jnp.broadcast_to(value, sum_ref.shape)
            peak_ref[...] = logits
            total_ref[...] = jnp.where(logits == -math.inf, 0.0, 1.0)

    if new is not None:

        @pl.when(new.is_in(block))
        def write() -> None:
            new.into_tiles(k_ref, v_ref)
            for copy in new.copies():
                copy.start()

        @pl.when((head == 0) & (step == 0))
        def mark() -> None:
            new.mark()

    # float32 in full: the products cost less than the memory that they wait for.
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(
        jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32
    )
    seen = seen_ref[0, 0, 0].astype(jnp.float32)
    logits = form.scale * dot(q, k_ref[0, 0].astype(q.dtype), (((1,), (1,)), ((), ())))
    if form.quantized:
        logits *= scale_refs[0][0, 0, 0]
    logits = jnp.where(seen > 0.0, form.bounded(logits), -math.inf)
    if form.weights:
        found = logits
        if new is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            own = (column == new.place) & new.exists
            found = jnp.where(own, new.attended(q)[0], logits)
        logits_ref[0][0, 0, 0] = found
    old = peak_ref[...]
    peak = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    finite = jnp.where(peak == -math.inf, 0.0, peak)
    fade = jnp.exp(old - finite)
    numerators = jnp.exp(logits - finite)
    peak_ref[...] = peak
    total_ref[...] = fade * total_ref[...] + jnp.sum(numerators, axis=1, keepdims=True)
    if form.quantized:
        numerators *= jnp.where(seen > 0.0, scale_refs[1][0, 0, 0], 0.0)
    # Slots that no query head sees may hold NaN, which a weight of 0 does not take away.
    used = jnp.max(seen, axis=0, keepdims=True)
    used = jnp.broadcast_to(used, (8, used.shape[1])).T[:, :1]
    v = jnp.where(used > 0.0, v_ref[0, 0].astype(jnp.float32), 0.0).astype(q.dtype)
    sum_ref[...] = fade * sum_ref[...] + dot(
        numerators.astype(q.dtype), v, (((1,), (0,)), ((), ()))
    )

    if new is not None:

        @pl.when(new.is_in(block))
        def finish_write() -> None:
            for copy in new.copies():
                copy.wait()

    @pl.when(step == pl.num_programs(2) - 1)
    def finish() -> None:
        total = total_ref[...]
        out = sum_ref[...] / jnp.where(total == 0.0, 1.0, total)
        out_ref[0, 0] = out.astype(out_ref.dtype)
