"""Work on the tokens of a prompt, of long ones a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import bits

__all__ = ["by_tokens"]

# Tokens that are worked on at once: far more than matrix units need to be busy.
_MOST_TOKENS = 16384


def by_tokens(f: Callable[..., Any], *arrays: Float[Array, "B T ..."], over: bool = False) -> Any:
    """`f(*arrays)`, where `f` makes something of each token by itself.

    What it makes on the way then is as large as a block, and not as the prompt: gate and up of a
    prompt of 128k would be two arrays of 3.8 GB in an 8B model, more than all else that its prefill
    holds beside the weights.

    Args:
        f: from blocks [B, t, ...] to a block, or several.
        *arrays: of all tokens.
        over: write what `f` makes over the first of the arrays, which is no longer needed, in
            place of an array of its own.
    """
    batch, tokens = arrays[0].shape[:2]
    block = max(1, _MOST_TOKENS // batch)
    if tokens <= block:
        return f(*arrays)
    out = arrays[0]
    if not over:
        out = jax.tree.map(functools.partial(_anything, arrays[0]), jax.eval_shape(f, *arrays))

    def fill(out: Any, start: Int[Array, ""], size: int) -> Any:
        def read(x: Array) -> Array:
            return bits.move(
                lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size, 1), x, at=start
            )

        done = f(*map(read, (out, *arrays[1:]) if over else arrays))
        return jax.tree.map(lambda out, done: bits.move(_write, out, done, at=start), out, done)

    blocks, rest = divmod(tokens, block)
    starts = block * jnp.arange(blocks)
    out, _ = bits.scan(lambda out, start: (fill(out, start, block), None), out, starts)
    return fill(out, jnp.int32(tokens - rest), rest) if rest else out


def _anything(known: Array, like: jax.ShapeDtypeStruct) -> Array:
    """An array to write to, of an entry of another one.

    Zeros depend on nothing, and XLA:CPU makes those of all layers at the beginning.
    """
    filled = bits.move(lambda x, at: jnp.full(like.shape, x.reshape(-1)[at]), known, at=0)
    return filled.astype(like.dtype)


def _write(x: Array, part: Array, at: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, at, 1)
