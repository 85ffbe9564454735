"""Times of programs on a device, and what the device can do at best."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, until its result is there; a first call is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def loop_seconds(
    op: Callable[..., Any], *args: Any, repeats: int, least_s: float = 0.02
) -> tuple[float, Any]:
    """The time of one call inside a compiled loop, so that starting a program does not count.

    Every round waits for the one before it: an element of the first argument is taken from the
    last result where that is NaN, which it is not.

    Args:
        op: of arrays, to be compiled.
        args: its arguments; the first one is an array of floats.
        repeats: how many loops the median is of.
        least_s: a loop has as many rounds as take about this long.

    Returns:
        Median seconds a round, and the result of the last round of the loop that was timed last.
    """

    def unchanged(*args: Any) -> tuple[Any, Any]:
        return op(*args), args

    seconds, (result, _) = state_loop_seconds(unchanged, *args, repeats=repeats, least_s=least_s)
    return seconds, result


def state_loop_seconds(
    op: Callable[..., tuple[Any, Any]], *args: Any, repeats: int, least_s: float = 0.02
) -> tuple[float, tuple[Any, Any]]:
    """As `loop_seconds`, of an op that changes its arguments, in place as far as it can.

    Args:
        op: its result, and a tuple of the arguments of the next round.
        args: those of the first round, which are copied once.
        repeats: see there.
        least_s: see there.

    Returns:
        Median seconds a round, and what the op gave in the last round.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(rounds: Array, args: Any) -> tuple[Any, Any]:
        def step(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            _, args = carry
            result, (first, *rest) = op(*args)
            corner = (0,) * first.ndim
            last = jax.tree.leaves(result)[0].ravel()[0].astype(first.dtype)
            first = first.at[corner].set(jnp.where(jnp.isnan(last), last, first[corner]))
            return result, (first, *rest)

        shapes, _ = jax.eval_shape(op, *args)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, rounds, step, (empty, args))

    last = None, jax.tree.map(jnp.copy, args)

    def run(rounds: int) -> Any:
        nonlocal last
        last = loop(jnp.int32(rounds), last[1])
        return last

    once = median_seconds(functools.partial(run, 1), 3)
    rounds = max(1, round(least_s / once))
    return median_seconds(functools.partial(run, rounds), repeats) / rounds, last


def bytes_per_second(size: int, *, repeats: int = 5) -> float:
    """Measured memory bandwidth: `size` bytes read and written again, in float32.

    They are written where they were read: a new array's pages come from the operating system on
    CPU, which takes longer than filling them.
    """
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)

    def run() -> Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * x.nbytes / median_seconds(run, repeats)


def flops_per_second(size: int, dtype: DTypeLike, *, repeats: int = 5) -> float:
    """Measured peak of products of two matrices of `size` x `size`."""
    x = jnp.ones((size, size), dtype)
    seconds = median_seconds(functools.partial(jax.jit(lambda x: x @ x), x), repeats)
    return 2 * size**3 / seconds


def device_memory() -> int | None:
    """Bytes of the first device, or of the machine; None where neither tells."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
