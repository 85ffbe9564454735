"""Window scores on a GPU: two Triton passes, in which a group's query heads share each load.

Importing this file needs Triton. Pass 1 is split over the keys and leaves statistics of each part,
which XLA puts together; pass 2 has a program for each block of keys. Rows of a group that exceed a
program of pass 1 go to programs side by side, whose loads of the same keys the L2 cache meets. In
the aggregated form pass 2 is two launches: averages of the weights, for which keys are read, then
distances, for which values are, so that either has registers and shared memory for large products.

Float32 is kept on tensor cores. Products of bfloat16 are exact there; of a product with float32
the float32, weights or a head's factor, is split into three of bfloat16, which hold it. In plain
float32 the distances alone would take 137 GFLOP of the 128k keys of an 8B layer through units of
60 TFLOP/s. Values of float16, whose range holds no such three, are multiplied by three of TF32,
errors about 2⁻²² of a term. Models in float32 have float32 throughout.

A distance is ‖ō R - v R‖: ō, a sum in float32, is no more exact than these products are, and
nothing is gained by the difference ō - v, which is no longer bfloat16.

Triton through jax-triton and not Pallas: Pallas's Triton backend is deprecated since jax 0.11.2
and wants powers of two for every array, so that keys of 80 or 96 numbers would be copied first,
where masks here read them as they are; Mosaic GPU's interface moves from release to release.

Predicted, not measured, of an 8B layer at 128k in bfloat16 on an H200 with 4.2 TB/s: each pass
reads 0.27 or 0.54 GB in 0.13 ms at most. Pass 1 multiplies 34 and 3 · 34 GFLOP, 0.2 ms at
700 TFLOP/s; pass 2 34 and 3 · 137 GFLOP, 0.6 ms, while it reads 3.2 GB of factors from the L2
cache: the distances bound the op, not the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.tiling import power_of_two
from pallas_kernels.triton_extra import triton_call
from pallas_kernels.window_scores.arithmetic import three_parts
from pallas_kernels.window_scores.bodies_gpu import scores_kernel, statistics_kernel
from pallas_kernels.window_scores.distances_gpu import reconstruction_kernel
from pallas_kernels.window_scores.form import ScoreForm
from pallas_kernels.window_scores.statistics import (
    PassTwo,
    RowStatistics,
    aggregated_targets,
    per_query_targets,
    project,
)
from pallas_kernels.window_scores.tiling import Tiling, gpu_tiling

# The fewest rows and columns of a matrix product.
_LEAST = 16


def window_scores_triton(
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
    tiling: Tiling | None = None,
    call: Callable[..., tuple[Array, ...]] = triton_call,
) -> Float[Array, "B N P"]:
    """See the public function; `call` launches a kernel as `triton_call` does."""
    query_positions = query_positions.astype(jnp.int32)
    key_positions = key_positions.astype(jnp.int32)
    if tiling is None:
        tiling = gpu_tiling(
            lists=k.shape[0] * k.shape[1],
            columns=k.shape[2],
            rows=q.shape[1] // k.shape[1] * q.shape[2],
            head_dim=q.shape[3],
            dtype=q.dtype,
        )
    for name in ("keys", "rows", "scored", "ranks"):
        number = getattr(tiling, name)
        if number < _LEAST or number != power_of_two(number):
            raise ValueError(f"tiling.{name}: expected a power of two from 16 up, got {number}")
    run = _Passes(q, k, v, query_positions, key_positions, form, tiling, call)
    if form.kind == "attention":
        if log_sums is None:
            peak, per_total = run.sums()
        else:
            # exp(logit - log_sum): the prompt's own attention knows the sums.
            peak, per_total = log_sums.astype(jnp.float32), jnp.ones(log_sums.shape, jnp.float32)
        return run.scores(PassTwo(peak=peak, per_total=per_total), row_weights)

    assert factor is not None
    factor = factor.astype(jnp.float32)
    statistics = run.statistics()
    if form.kind == "per_query":
        return run.scores(per_query_targets(statistics, factor, form), row_weights, factor)
    assert row_weights is not None
    target = aggregated_targets(
        statistics, q, k, factor, row_weights, query_positions, key_positions, form
    )
    assert target.output is not None
    target = target._replace(output=project(target.output, factor))
    averaged = run.scores(target, row_weights)
    return run.reconstruction(averaged, target, factor)


class _Passes:
    """Launches with what both passes share."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array | None,
        query_positions: Array,
        key_positions: Array,
        form: ScoreForm,
        tiling: Tiling,
        call: Callable[..., tuple[Array, ...]],
    ) -> None:
        self.batch, self.heads, self.window, self.size = q.shape
        self.kv_heads, self.columns = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.v, self.form, self.tiling, self.call = v, form, tiling, call
        # Keys stand in for values that are not read.
        self.inputs = (q, k, k if v is None else v, query_positions, key_positions)
        self.precision = "ieee" if q.dtype == jnp.float32 else "tf32x3"
        self.static: dict[str, Any] = {
            "kv_heads": self.kv_heads,
            "place_heads": key_positions.shape[1],
            "columns": self.columns,
            "past": form.past,
            "size": self.size,
            "SIZE": max(_LEAST, power_of_two(self.size)),
        }
        self.of_keys: dict[str, Any] = {
            "window": self.window,
            "scale": float(form.scale),
            "softcap": 0.0 if form.softcap is None else float(form.softcap),
            "sliding_window": form.sliding_window or 0,
        }

    def sums(self) -> tuple[Float[Array, "B N W"], Float[Array, "B N W"]]:
        """Peak and 1 over the sum of weights of each row, 0 where it sees nothing."""
        peaks, totals, *_ = self._pass_one(values=False)
        peak = jnp.max(peaks, axis=0)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        total = jnp.sum(totals * jnp.exp(peaks - peak), axis=0)
        return peak, jnp.where(total > 0.0, 1.0 / jnp.where(total > 0.0, total, 1.0), 0.0)

    def statistics(self) -> RowStatistics:
        """Of all parts together: only one part's dominant key stays apart from the others."""
        assert self.v is not None
        peaks, rests, tops, columns, others = self._pass_one(values=True)
        peak = jnp.max(peaks, axis=0)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        fade = jnp.exp(peaks - peak)
        best = jnp.argmax(tops, axis=0)[None]  # of equal ones the first, which has the lower column
        apart = jnp.arange(len(tops))[:, None, None, None] == best
        demoted = jnp.where(apart, 0.0, jnp.exp(tops - peak))
        # Values of the parts' dominant keys, [P, B, N, W, H].
        index = jnp.moveaxis(jnp.maximum(columns, 0), 0, 2)  # [B, N, P, W]
        index = index.reshape(self.batch, self.kv_heads, -1, 1)
        values = jnp.take_along_axis(self.v, index, axis=2)
        values = values.reshape(self.batch, self.heads, len(tops), self.window, self.size)
        values = jnp.moveaxis(values, 2, 0).astype(jnp.float32)
        values = jnp.where(columns[..., None] >= 0, values, 0.0)
        first = functools.partial(jnp.take_along_axis, indices=best, axis=0)
        return RowStatistics(
            peak=peak,
            logit=first(tops)[0],
            column=first(columns)[0],
            rest=jnp.sum(rests * fade + demoted, axis=0),
            value=jnp.sum(jnp.where(apart[..., None], values, 0.0), axis=0),
            others=jnp.sum(others * fade[..., None] + demoted[..., None] * values, axis=0),
        )

    def _pass_one(self, *, values: bool) -> tuple[Array, ...]:
        keys, rows = self.tiling.keys, self.group * self.window
        # Whole blocks in each part.
        part = -(-self.columns // (self.tiling.parts * keys)) * keys
        parts, tiles = -(-self.columns // part), -(-rows // self.tiling.rows)
        lists = self.batch * self.kv_heads
        shape = (parts, self.batch, self.heads, self.window)
        number = jax.ShapeDtypeStruct(shape, jnp.float32)
        unused = jax.ShapeDtypeStruct((1,), jnp.float32)
        outputs = [number, number, unused, unused, unused]
        if values:
            column = jax.ShapeDtypeStruct(shape, jnp.int32)
            outputs[2:] = [number, column, jax.ShapeDtypeStruct((*shape, self.size), jnp.float32)]
        return self.call(
            statistics_kernel,
            self.inputs,
            outputs,
            name="window_statistics",
            grid=(tiles, parts, lists),
            num_warps=self.tiling.num_warps,
            num_stages=self.tiling.num_stages,
            lists=lists,
            group_rows=rows,
            part=part,
            ONLY_PAST=self.form.kind == "aggregated",
            VALUES=values,
            KEYS=keys,
            ROWS=self.tiling.rows,
            **self.static,
            **self.of_keys,
        )

    def scores(
        self,
        target: PassTwo,
        row_weights: Float[Array, " W"] | None,
        factor: Float[Array, "N H R"] | None = None,
    ) -> Float[Array, "B N P"]:
        """Pass 2 over the keys: weights averaged over the rows or, with a factor, their errors."""
        form, by_query = self.form, factor is not None
        mean = jnp.ones(self.window) if row_weights is None else row_weights
        window = max(_LEAST, power_of_two(self.window))
        keys = self.tiling.scored
        if factor is not None:
            # Differences [keys, W, 16] are in registers.
            keys = max(_LEAST, min(keys, 1024 // window))
            factor = self._split(factor)
        optional = (target.output, target.column, target.exact, target.per_norm, factor)
        (scores,) = self.call(
            scores_kernel,
            (
                *self.inputs,
                mean.astype(jnp.float32),
                target.peak,
                target.per_total,
                # The peaks stand in for what averages do without.
                *(target.peak if x is None or not by_query else x for x in optional),
            ),
            [jax.ShapeDtypeStruct((self.batch, self.heads, form.past), jnp.float32)],
            name="window_scores_per_query" if by_query else "window_scores_attention",
            grid=(-(-form.past // keys), self.batch * self.kv_heads),
            num_warps=self.tiling.num_warps,
            num_stages=1,
            group=self.group,
            rank=1 if factor is None else factor.shape[-1],
            power=float(form.power),
            precision=self.precision,
            MAXIMUM=row_weights is None,
            BY_QUERY=by_query,
            PARTS=1 if factor is None else factor.shape[0],
            KEYS=keys,
            WINDOW=window,
            RANK=_LEAST,
            **self.static,
            **self.of_keys,
        )
        return scores

    def reconstruction(
        self, averaged: Float[Array, "B N P"], target: PassTwo, factor: Float[Array, "N H R"]
    ) -> Float[Array, "B N P"]:
        """Pass 2 over the values: the averaged weights' odds times distances from the output."""
        form, factor = self.form, self._split(factor)
        _, _, v, _, key_positions = self.inputs
        (scores,) = self.call(
            reconstruction_kernel,
            (v, key_positions, averaged, target.output, target.column, target.exact, factor),
            [jax.ShapeDtypeStruct(averaged.shape, jnp.float32)],
            name="window_scores_aggregated",
            grid=(-(-form.past // self.tiling.scored), self.batch * self.kv_heads),
            num_warps=self.tiling.num_warps,
            num_stages=1,
            group=self.group,
            rank=factor.shape[-1],
            tau=float(form.tau),
            precision=self.precision,
            PARTS=factor.shape[0],
            KEYS=self.tiling.scored,
            RANK=self.tiling.ranks,
            **self.static,
        )
        return scores

    def _split(self, factor: Float[Array, "N H R"]) -> Float[Array, "parts N H R"]:
        """What values are multiplied by, in parts of their type if that is bfloat16."""
        return three_parts(factor) if self.inputs[2].dtype == jnp.bfloat16 else factor[None]
