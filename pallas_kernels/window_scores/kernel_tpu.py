"""Window scores on a TPU: two Mosaic passes, each of which loads every key and value once.

The query rows of a group that shares a key/value head are one matrix, [M, H] with M = G · W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.varying import outputs_like
from pallas_kernels.window_scores.bodies_tpu import (
    aggregated_kernel,
    attention_kernel,
    per_query_kernel,
    statistics_kernel,
    sums_kernel,
)
from pallas_kernels.window_scores.form import ScoreForm
from pallas_kernels.window_scores.statistics import (
    PassTwo,
    RowStatistics,
    aggregated_targets,
    per_query_targets,
)
from pallas_kernels.window_scores.tiling import LANES, Tiling

_SUBLANES = 8


def window_scores(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"] | None,
    factor: Float[Array, "N H R"] | None,
    row_weights: Float[Array, " W"] | None,
    query_positions: Int[Array, "B W"],
    key_positions: Int[Array, "B M T"],
    log_sums: Float[Array, "B N W"] | None,
    *,
    form: ScoreForm,
    tiling: Tiling,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N P"]:
    """See the public function."""
    if tiling.keys % LANES:
        raise ValueError(f"tiling.keys: expected a multiple of {LANES}, got {tiling.keys}")
    batch, heads, window, _ = q.shape
    columns = k.shape[2]
    run = _Passes(q, k, query_positions, key_positions, form, tiling.keys, interpret)
    if form.kind == "attention":
        if log_sums is None:
            peak, total = run(
                sums_kernel, columns, outputs=[(1, jnp.float32)] * 2, name="window_sums"
            )
            peak, total = (x.reshape(batch, heads, window) for x in (peak, total))
            peak = jnp.where(total > 0.0, peak, 0.0)
            per_total = jnp.where(total > 0.0, 1.0 / jnp.where(total > 0.0, total, 1.0), 0.0)
        else:
            # exp(logit - log_sum): the prompt's own attention knows the sums.
            peak, per_total = log_sums, jnp.ones_like(log_sums)
        return run.scores(attention_kernel, PassTwo(peak=peak, per_total=per_total), row_weights)

    assert v is not None
    assert factor is not None
    size = v.shape[-1]
    # Zeros fill R up to whole registers: they add nothing to a norm.
    factor = factor.astype(jnp.float32)
    factor = jnp.pad(factor, ((0, 0), (0, 0), (0, -factor.shape[-1] % _SUBLANES)))
    found = run(
        statistics_kernel,
        columns,
        by_key=[v],
        outputs=[
            (1, jnp.float32),
            (1, jnp.float32),
            (1, jnp.int32),
            (1, jnp.float32),
            (size, jnp.float32),
            (size, jnp.float32),
        ],
        name="window_statistics",
    )
    *numbers, value, others = (x.reshape(batch, heads, window, -1) for x in found)
    peak, logit, column, rest = (x[..., 0] for x in numbers)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    statistics = RowStatistics(peak, logit, column, rest, value, others)
    if form.kind == "per_query":
        target = per_query_targets(statistics, factor, form)
        return run.scores(per_query_kernel, target, row_weights, v, factor)
    assert row_weights is not None
    target = aggregated_targets(
        statistics, q, k, factor, row_weights, query_positions, key_positions, form
    )
    return run.scores(aggregated_kernel, target, row_weights, v, factor)


class _Passes:
    """Calls kernels with what all of them read: queries, keys and their positions."""

    def __init__(
        self,
        q: Array,
        k: Array,
        query_positions: Array,
        key_positions: Array,
        form: ScoreForm,
        block: int,
        interpret: bool | pltpu.InterpretParams,
    ) -> None:
        self.batch, self.heads, self.window, _ = q.shape
        self.kv_heads, columns = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.form, self.block, self.interpret = form, block, interpret
        # Columns that the last block is short of hold no key.
        widths = ((0, 0), (0, 0), (0, -columns % block))
        places = jnp.pad(key_positions, widths, constant_values=-1)[:, :, None]
        per_head = int(key_positions.shape[1] > 1)
        rows = jnp.tile(query_positions, (1, self.group))[:, None, :, None]
        self.operands = [self.by_head(q), k, rows, places]
        self.specs = [
            _whole(self.operands[0].shape),
            self.blocks(k),
            pl.BlockSpec((None, None, *rows.shape[2:]), lambda b, _, __: (b, 0, 0, 0)),
            pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h * per_head, 0, i)),
        ]

    def __call__(
        self,
        kernel: Callable[..., None],
        columns: int,
        *,
        by_head: Sequence[Array] = (),
        by_key: Sequence[Array] = (),
        shared: Sequence[Array] = (),
        outputs: Sequence[tuple[int, Any]] = (),
        scores: bool = False,
        scratch: Sequence[Any] = (),
        name: str,
        **static: Any,
    ) -> list[Array]:
        """Runs `kernel` over blocks of the first `columns` columns.

        Args:
            kernel: body; its references are the shared operands, then the three lists, then what
                it writes, then scratch.
            columns: how many of them.
            by_head: [B, K, ...] loaded whole, once for each key/value head.
            by_key: [B, K, T, E] loaded by block.
            shared: [K, ...], the same for all rows of the batch, or [W, 1].
            outputs: width and type of results by query row, written at each block.
            scores: whether it writes scores by key instead.
            scratch: memory that lasts from block to block.
            name: in profiles.
            static: further static arguments of the kernel.
        """
        small = [*by_head, *shared]
        if scores:
            shape: Sequence[jax.ShapeDtypeStruct] = [
                jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.group, columns), jnp.float32)
            ]
            out_specs = [
                pl.BlockSpec((None, None, self.group, self.block), lambda b, h, i: (b, h, 0, i))
            ]
        else:
            rows = (self.batch, self.kv_heads, self.group * self.window)
            shape = [jax.ShapeDtypeStruct((*rows, width), dtype) for width, dtype in outputs]
            out_specs = [_whole(x.shape) for x in shape]
        return pl.pallas_call(
            functools.partial(kernel, form=self.form, **static),
            grid=(self.batch, self.kv_heads, pl.cdiv(columns, self.block)),
            in_specs=[
                *self.specs,
                *(_whole(x.shape) for x in by_head),
                *(_shared(x.shape) for x in shared),
                *(self.blocks(x) for x in by_key),
            ],
            out_specs=out_specs,
            out_shape=outputs_like(shape, self.operands, small, by_key),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name=name,
        )(*self.operands, *small, *by_key)

    def scores(
        self,
        kernel: Callable[..., None],
        target: PassTwo,
        row_weights: Float[Array, " W"] | None,
        v: Float[Array, "B K T H"] | None = None,
        factor: Float[Array, "N H R"] | None = None,
    ) -> Float[Array, "B N P"]:
        """Pass 2."""
        mean = jnp.ones(self.window) if row_weights is None else row_weights
        shared, scratch = [mean.astype(jnp.float32)[:, None]], []
        if factor is not None:
            shared.append(factor.mT.reshape(self.kv_heads, self.group, -1, factor.shape[1]))
            if self.form.kind == "per_query":
                scratch.append(pltpu.VMEM((factor.shape[-1], self.block), jnp.float32))
        columns = self.form.past
        (out,) = self(
            kernel,
            columns,
            by_head=[self.by_head(x) for x in target if x is not None],
            shared=shared,
            by_key=[] if v is None else [v],
            scores=True,
            scratch=scratch,
            name=f"window_scores_{self.form.kind}",
            maximum=row_weights is None,
            group=self.group,
        )
        return out.reshape(self.batch, self.heads, columns)

    def by_head(self, x: Array) -> Array:
        """[B, N, X] or [B, N, X, E] as [B, K, G · X, E]."""
        return x.reshape(self.batch, self.kv_heads, self.group * x.shape[2], *(x.shape[3:] or (1,)))

    def blocks(self, x: Array) -> pl.BlockSpec:
        """Of keys."""
        return pl.BlockSpec((None, None, self.block, x.shape[-1]), lambda b, h, i: (b, h, i, 0))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape[2:]), lambda b, h, _: (b, h, 0, 0))


def _shared(shape: tuple[int, ...]) -> pl.BlockSpec:
    if len(shape) == 2:
        return pl.BlockSpec(shape, lambda *_: (0, 0))
    return pl.BlockSpec((None, *shape[1:]), lambda _, h, __: (h, 0, 0, 0))
