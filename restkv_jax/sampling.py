"""Choosing the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

# Of the first row, or of each.
Seed = int | Sequence[int] | np.ndarray | Int[Array, "*B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; static under `jit`.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens; None for all.
        top_p: draw among the fewest most likely tokens whose probabilities reach p.
        min_new_tokens: stop tokens are barred until a row has this many tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: naming the option.
        """
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number within (0, 1], got {self.top_p!r}")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens: expected at least 0, got {self.min_new_tokens!r}")


GREEDY = Sampling()


def row_keys(seed: Seed, batch: int) -> Key[Array, " B"]:
    """One random key per row: row b draws as a batch of one with seed `seed + b` would.

    Args:
        seed: of the first row, or one for each row, from 0 to 2³² - 1.
        batch: B.

    Raises:
        ValueError: no integers, not one for each row, or (of those on the host) out of range.
    """
    seeds = seed if isinstance(seed, jax.Array) else np.asarray(seed)
    if not jnp.issubdtype(seeds.dtype, jnp.integer) or seeds.shape not in ((), (batch,)):
        raise ValueError(f"seed: expected one integer, or one for each of {batch} rows, got {seed}")
    if isinstance(seeds, np.ndarray) and ((seeds < 0) | (seeds >= 2**32)).any():
        raise ValueError(f"seed: expected from 0 to 2**32 - 1, got {seed}")
    after = jnp.arange(batch, dtype=jnp.uint32) if seeds.ndim == 0 else 0
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32) + after)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row.

    Args:
        logits: float32.
        keys: one per row, used up.
        sampling: how.

    Returns:
        Tokens, and their log-probabilities under the model itself, that is under
        softmax(logits) before temperature, top-k and top-p.
    """
    if sampling.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
    else:
        scaled = truncate(logits / sampling.temperature, sampling)
        token = jax.vmap(jax.random.categorical)(keys, scaled)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets what top-k and top-p leave out to -inf; of equal logits all stay."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = jnp.where(before < sampling.top_p, ordered, jnp.inf)
        logits = jnp.where(logits < jnp.min(inside, axis=-1, keepdims=True), -jnp.inf, logits)
    return logits
