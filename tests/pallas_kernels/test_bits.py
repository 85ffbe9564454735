"""16-bit floats that are moved as bits: the same results, and no pass over whole arrays."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bits

TOTAL = 4099
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8]


def write(whole, part, at):
    return whole.at[at].set(part)


def every_value(dtype):
    """All bit patterns of a 16-bit type, infinities and every NaN among them."""
    return jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)


def patterns(x):
    return np.asarray(x).view(np.uint16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_no_bit_changes(dtype):
    values, at = every_value(dtype), jnp.arange(2**16)[::-1]
    taken = jax.jit(lambda x, at: bits.move(lambda x, at: x[at], x, at=at))(values, at)
    np.testing.assert_array_equal(patterns(taken), patterns(values)[::-1])
    written = jax.jit(lambda x, y, at: bits.move(write, x, y, at=at))(values, values[:3], at[:3])
    expected = patterns(values).copy()
    expected[::-1][:3] = patterns(values)[:3]
    np.testing.assert_array_equal(patterns(written), expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: d.__name__)
def test_derivatives_are_those_of_the_move(dtype):
    whole, part = jnp.arange(6, dtype=dtype), jnp.ones(2, dtype)
    weights, at = jnp.arange(10, 16, dtype=dtype), jnp.asarray([1, 4])

    def loss(whole, part):
        return jnp.sum(weights * bits.move(write, whole, part, at=at)).astype(jnp.float32)

    of_whole, of_part = jax.grad(loss, (0, 1))(whole, part)
    np.testing.assert_array_equal(of_whole, jnp.asarray([10, 0, 12, 13, 0, 15], dtype))
    np.testing.assert_array_equal(of_part, jnp.asarray([11, 14], dtype))


def steps_of(array, loop):
    """Writes an entry of its own in each of five steps, doubled."""

    def step(carry, x):
        array, i = carry
        before = bits.move(lambda a, at: a[at], array, at=i[None])
        array = bits.move(write, array, (before * 2).astype(array.dtype), at=i[None])
        return (array, i + 1), x

    if loop == "scan":
        (array, _), out = bits.scan(step, (array, jnp.int32(0)), jnp.arange(5))
        return array, out
    array, _ = bits.while_loop(
        lambda carry: carry[1] < 5, lambda c: step(c, None)[0], (array, jnp.int32(0))
    )
    return array, jnp.arange(5)


@pytest.mark.parametrize("loop", ["scan", "while_loop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_loops_give_what_those_of_jax_give(dtype, loop):
    start = jnp.arange(8).astype(dtype)
    array, out = jax.jit(steps_of, static_argnums=1)(start, loop)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, np.asarray([0, 2, 4, 6, 8, 5, 6, 7], dtype))
    np.testing.assert_array_equal(out, np.arange(5))


@pytest.mark.parametrize("loop", ["scan", "while_loop"])
def test_a_step_passes_over_no_whole_array(loop):
    array = jax.ShapeDtypeStruct((TOTAL,), jnp.bfloat16)
    text = jax.jit(steps_of, static_argnums=1).lower(array, loop).compile().as_text()
    assert not re.search(rf"f32\[{TOTAL}\]\S* convert\(", text)
    loops = [line for line in text.splitlines() if " while(" in line]
    assert len(loops) == 1
    assert f"u16[{TOTAL}]" in loops[0]
    assert f"bf16[{TOTAL}]" not in loops[0]


def test_on_other_platforms_floats_stay_floats():
    array = jax.ShapeDtypeStruct((TOTAL,), jnp.bfloat16)
    lowered = jax.jit(steps_of, static_argnums=1).trace(array, "scan")
    assert "ui16" in lowered.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        assert "ui16" not in lowered.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: d.__name__)
def test_derivatives_through_a_loop(dtype):
    """With respect to what is carried, what comes in, and what the step closes over."""

    def last(x, xs, factor):
        return bits.scan(lambda c, x: (c * factor + x, c), x, xs)[0].astype(jnp.float32)

    args = jnp.asarray(1, dtype), jnp.asarray([1, 2, 3], dtype), jnp.asarray(2, dtype)
    of_x, of_xs, of_factor = jax.jit(jax.grad(last, (0, 1, 2)))(*args)
    assert (float(of_x), of_xs.tolist()) == (8, [4, 2, 1])
    assert float(of_factor) == 3 * 2**2 + 2 * 2 + 2  # of f³ + f² + 2 f + 3
    loop = jax.jit(lambda x: bits.while_loop(lambda c: c < 20, lambda c: c * c, x))
    assert float(jax.jvp(loop, (jnp.asarray(2, dtype),), (jnp.ones((), dtype),))[1]) == 8 * 2**7


def test_no_steps_change_nothing():
    x = jnp.ones(2, jnp.bfloat16)
    after, out = bits.scan(lambda c, x: (c + x, c), x, jnp.zeros((0, 2), jnp.bfloat16))
    assert (after.tolist(), out.shape) == ([1, 1], (0, 2))
