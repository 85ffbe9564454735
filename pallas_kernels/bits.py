"""Moving 16-bit floats as bits, which is what they are to whoever only moves them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.dispatch import with_derivatives_of

__all__ = ["move", "scan", "while_loop"]

Move = Callable[..., Num[Array, "*Out"]]
Carry = TypeVar("Carry")
X = TypeVar("X")
Out = TypeVar("Out")


def move(how: Move, *numbers: Num[Array, "*In"], at: int | Int[Array, "*I"]) -> Num[Array, "*Out"]:
    """`how(*numbers, at)`, without a change of type on CPU.

    XLA:CPU computes bfloat16 and float16 in float32 and takes moving them for computing: to write
    one entry into a cache, it turns the whole cache into float32 and back. Integers stay what
    they are. Derivatives are those of `how`, which is linear.

    Args:
        how: reads and writes numbers by their place alone, whatever their type.
        *numbers: arrays of one dtype, which is that of the result, too.
        at: the places.
    """
    if not _is_short(numbers[0]):
        return how(*numbers, at)
    # Of 64 bits, for whoever asks for the shapes of what no memory holds.
    places = np.asarray(at) if isinstance(at, int) else at
    return _move_floats(how, numbers, places)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _move_floats(
    how: Move, floats: tuple[Float[Array, "*In"], ...], at: Int[Array, "*I"] | np.ndarray
) -> Float[Array, "*Out"]:
    def as_bits(floats: tuple[Array, ...], at: Array) -> Array:
        return jax.lax.bitcast_convert_type(how(*_to_bits(floats), at), floats[0].dtype)

    def as_floats(floats: tuple[Array, ...], at: Array) -> Array:
        return how(*floats, at)

    return jax.lax.platform_dependent(floats, at, cpu=as_bits, default=as_floats)


@_move_floats.defjvp
def _move_tangents(
    how: Move, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    (floats, at), (changes, _) = primals, tangents
    _, change = jax.jvp(lambda *floats: how(*floats, at), floats, changes)
    return _move_floats(how, floats, at), change


def scan(
    step: Callable[[Carry, X], tuple[Carry, Out]],
    carry: Carry,
    xs: X | None = None,
    *,
    length: int | None = None,
) -> tuple[Carry, Out]:
    """`jax.lax.scan` that on CPU carries 16-bit floats as bits, for steps that `move` them.

    Otherwise each step would end by turning whole arrays of bits into floats. Derivatives are those
    of the loop over floats; bits have none.
    """
    if not any(map(_is_short, jax.tree.leaves(carry))):
        return jax.lax.scan(step, carry, xs, length=length)
    x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    step, used = _with_arguments(step, carry, x)

    def plain(carry: Carry, xs: X | None, *used: Array) -> tuple[Carry, Out]:
        return jax.lax.scan(lambda carry, x: step(carry, x, *used), carry, xs, length=length)

    def on_cpu(carry: Carry, xs: X | None, *used: Array) -> tuple[Carry, Out]:
        def step_on_bits(bits: Any, x: X) -> tuple[Any, Out]:
            after, out = step(_from_bits(bits, carry), x, *used)
            return _to_bits(after), out

        bits, out = jax.lax.scan(step_on_bits, _to_bits(carry), xs, length=length)
        return _from_bits(bits, carry), out

    on_cpu = with_derivatives_of(plain, on_cpu)
    return jax.lax.platform_dependent(carry, xs, *used, cpu=on_cpu, default=plain)


def while_loop(
    condition: Callable[[Carry], Bool[Array, ""]], step: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """`jax.lax.while_loop`, with what `scan` does."""
    if not any(map(_is_short, jax.tree.leaves(carry))):
        return jax.lax.while_loop(condition, step, carry)
    step, used = _with_arguments(step, carry)

    def plain(carry: Carry, *used: Array) -> Carry:
        return jax.lax.while_loop(condition, lambda carry: step(carry, *used), carry)

    def on_cpu(carry: Carry, *used: Array) -> Carry:
        bits = jax.lax.while_loop(
            lambda bits: condition(_from_bits(bits, carry)),
            lambda bits: _to_bits(step(_from_bits(bits, carry), *used)),
            _to_bits(carry),
        )
        return _from_bits(bits, carry)

    on_cpu = with_derivatives_of(plain, on_cpu)
    return jax.lax.platform_dependent(carry, *used, cpu=on_cpu, default=plain)


def _with_arguments(step: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Array]]:
    """`step`, traced once, with what it closes over as arguments, that has derivatives, too."""
    step, used = jax.closure_convert(step, *args)
    return jax.jit(step), used


def _is_short(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2


def _to_bits(floats: Any) -> Any:
    def bits(x: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if _is_short(x) else x

    return jax.tree.map(bits, floats)


def _from_bits(bits: Any, like: Any) -> Any:
    def floats(x: Array, y: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, y.dtype) if _is_short(y) else x

    return jax.tree.map(floats, bits, like)
