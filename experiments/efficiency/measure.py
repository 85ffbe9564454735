"""Measures one cell: the whole model, then its layers apart."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core.measure import median_seconds
from experiments.efficiency.cells import (
    CHUNK,
    Cell,
    Programs,
    abstract_prompt,
    decode_arguments,
)
from experiments.efficiency.layers import attention_seconds, choosing_seconds
from experiments.efficiency.subject import Subject
from experiments.efficiency.work import decode_work, prefill_work
from experiments.kernel_bench import Floor
from restkv_jax.decode import CachePlan, DecodeState, init_decode, prefill


def dense_seconds(subject: Subject, cell: Cell, repeats: int) -> float:
    """A prefill that keeps nothing: what scoring and eviction are a share of."""
    program = prefill.lower(subject.abstract, *abstract_prompt(cell), plans=()).compile()
    prompt = _prompt(subject, cell)
    return median_seconds(lambda: program(subject.model, *prompt), repeats)


def measure_cell(
    subject: Subject, cell: Cell, plan: CachePlan, programs: Programs, floor: Floor, repeats: int
) -> dict[str, Any]:
    """Times and bytes of a cell, as plain JSON values.

    Args:
        subject: the network.
        cell: what is measured.
        plan: its cache plan; the headroom is what is decoded, `CHUNK` tokens of it uncounted.
        programs: of `compile_cell`.
        floor: of the device.
        repeats: how many times each median is of.

    Returns:
        In seconds: `ttft_s` to the first token, `score_s` and `evict_s` of all layers in a
        prefill, `token_s` of a decoded token, `ttft_floor_s` and `token_floor_s`; of a full cache
        also `attention_s` and `library_attention_s` of all layers in one step, unless a layer has
        a sliding window, and `baseline_token_s`, the step with the better of the two. In bytes:
        the cache, what the programs have alive, and what the process has ever had, if this cell
        raised that.
    """
    before = used_bytes()
    config, specs, dtype = subject.config, subject.model.layer_specs, subject.model.kv_dtype
    prompt, arguments = _prompt(subject, cell), decode_arguments(cell.batch)
    state: DecodeState | None = None

    def begin() -> jax.Array:
        nonlocal state
        state = None  # one cache at a time
        logits, (cache,) = programs.prefill(subject.model, *prompt)
        state = init_decode(logits, cache, *arguments)
        return state.token

    ttft = median_seconds(begin, repeats)
    assert state is not None
    cache_bytes = state.cache.total_bytes
    prefill_floor = prefill_work(config, subject.dtype, cell.batch, cell.length)
    decode_floor = decode_work(config, subject.dtype, cell.batch, state.cache)
    times = []
    for _ in range(plan.headroom // CHUNK):
        start = time.perf_counter()
        state, tokens, _ = programs.decode(subject.model, state, arguments[2])
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / CHUNK)
    state = None
    token = statistics.median(times[1:])
    after = used_bytes()
    sizes: dict[str, Any] = {"batch": cell.batch, "dtype": dtype, "repeats": repeats}
    scoring, moving = choosing_seconds(
        plan, specs, length=cell.length, width=config.hidden_size, **sizes
    )
    found = {
        "length": cell.length,
        "batch": cell.batch,
        "policy": cell.name,
        "ttft_s": ttft,
        "ttft_floor_s": prefill_floor.seconds(floor),
        "score_s": scoring,
        "evict_s": moving,
        "token_s": token,
        "token_floor_s": decode_floor.seconds(floor),
        "tokens_per_s": cell.batch / token,
        "cache_bytes": cache_bytes,
        "prefill_bytes": programs.prefill_bytes,
        "decode_bytes": programs.decode_bytes,
        "observed_peak_bytes": after if after > before else None,
        "floor": floor._asdict(),
    }
    if plan.policy.needs_budget:
        return found
    spared = 0.0
    # The attention that is timed apart looks at all slots, which a layer with a window has not.
    if not any(spec.window for spec in specs):
        slots = cell.length + plan.headroom
        own, library = attention_seconds(specs[0], slots=slots, **sizes)
        found["attention_s"] = len(specs) * own
        found["library_attention_s"] = None if library is None else len(specs) * library
        spared = 0.0 if library is None else len(specs) * max(own - library, 0.0)
    found["baseline_token_s"] = token - spared
    return found


def used_bytes() -> int:
    """Most bytes that were ever in use at once: on the device, or on CPU by the process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _prompt(subject: Subject, cell: Cell) -> tuple[jax.Array, jax.Array]:
    shape = (cell.batch, cell.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, subject.config.vocab_size)
    return tokens.astype(jnp.int32), jnp.ones(shape, bool)
