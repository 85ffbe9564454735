"""What arguments are checked for where they enter."""

from __future__ import annotations

import jax.numpy as jnp
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
