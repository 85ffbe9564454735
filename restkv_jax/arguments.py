"""What arguments are checked for where they enter."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def check_tokens(tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> None:
    """Refuses what is no batch of tokens with a mask for each of them.

    Raises:
        ValueError: naming the argument, and what came as it.
    """
    if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "tokens: expected integers [B, T] of at least one column, got "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    if valid.shape != tokens.shape:
        raise ValueError(
            f"valid: expected a mask of the tokens' shape {list(tokens.shape)}, got "
            f"{list(valid.shape)}"
        )


def token_ids(name: str, given: Sequence[int] | AbstractSet[int] | np.ndarray) -> np.ndarray:
    """Token ids [T] as an array on the host, whatever they came in.

    Raises:
        ValueError: beginning with `name`: no row of integers.
    """
    ids = np.asarray(sorted(given) if isinstance(given, AbstractSet) else given)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"{name}: expected a row of integers, which are token ids, got {reprlib.repr(given)}"
        )
    return ids


def integer(value: object) -> int | None:
    """An integer of any kind, numpy's too, as Python's; None for what is none, and for a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def whole_number(name: str, value: object, *, least: int) -> int:
    """An integer of any kind as Python's.

    Raises:
        ValueError: beginning with `name`: no integer, or one below `least`.
    """
    number = integer(value)
    if number is None or number < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return number
