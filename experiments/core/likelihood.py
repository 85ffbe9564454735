"""Log-probabilities of given tokens from a cache, however many they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.core.compiled import let_programs_go
from restkv_jax.cache import KVCache
from restkv_jax.decode import CausalLM, extend, last_logits


@dataclasses.dataclass(frozen=True)
class Followed:
    """What `follow` found.

    Attributes:
        logprobs: float32 [T] log p of each token given all that was kept before it, in nats.
        greedy: bool [T] whether it was the most likely one.
        cache: the cache with the tokens in it.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    cache: KVCache


def follow(
    model: CausalLM,
    logits: Float[Array, "1 V"],
    cache: KVCache,
    tokens: Sequence[int],
    *,
    piece: int = 64,
    pieces: int = 1,
) -> Followed:
    """Feeds tokens piece by piece; each sees the cache and all that came before it.

    A cache that evicts while decoding does so at the same tokens as if they came one by one.

    Args:
        model: see `CausalLM`.
        logits: of the last token in the cache, from which the first of `tokens` is predicted.
        cache: room for the tokens, unless it evicts while decoding; stays as it is.
        tokens: T tokens.
        piece: tokens that go through the model at once, static; a cache that evicts while
            decoding has its own number.
        pieces: run a multiple of so many pieces, the last ones possibly empty: each number of
            pieces compiles.
    """
    let_programs_go()
    first, piece = _schedule(cache, piece)
    needed = 1 + max(0, -(-(len(tokens) - first) // piece))
    rows = -(-needed // pieces) * pieces
    valid = np.ones((rows, piece), bool)
    valid[0, first:] = False
    # Fill the valid places in reading order, and mark those without a token.
    places = np.flatnonzero(valid)
    padded = np.zeros(rows * piece, np.int32)
    padded[places[: len(tokens)]] = tokens
    valid.reshape(-1)[places[len(tokens) :]] = False
    logprobs, greedy, cache = _follow(
        model, logits, cache, padded.reshape(rows, 1, piece), valid[:, None]
    )
    return Followed(np.asarray(logprobs)[valid], np.asarray(greedy)[valid], cache)


def _schedule(cache: KVCache, piece: int) -> tuple[int, int]:
    """Tokens of the first piece, and of each other one."""
    room = cache.room
    if cache.eviction is None or room is None:
        piece = piece if room is None else min(piece, room)
        return piece, piece
    # Eviction comes when the slots are full, and leaves the budget: the first piece fills what is
    # left of the slots, each other one what an eviction empties.
    used = max(int(jnp.max(stack.used)) for stack in cache.stacks if not stack.ring)
    left = cache.eviction.budget + room - used
    return (left - 1) % room + 1, room


@jax.jit
def _follow(
    model: CausalLM,
    logits: Float[Array, "1 V"],
    cache: KVCache,
    tokens: Int[Array, "P 1 T"],
    valid: Bool[Array, "P 1 T"],
) -> tuple[Float[Array, "P T"], Bool[Array, "P T"], KVCache]:
    def step(
        carry: tuple[Array, KVCache], piece: tuple[Array, Array]
    ) -> tuple[tuple[Array, KVCache], tuple[Array, Array]]:
        logits, cache = carry
        tokens, valid = piece
        after, cache = extend(model, cache, tokens, valid)
        before = jnp.concatenate([logits[:, None], after[:, :-1]], axis=1)[0]
        chosen = jnp.take_along_axis(before, tokens[0][:, None], axis=-1)[:, 0]
        logprobs = chosen - jax.nn.logsumexp(before, axis=-1)
        greedy = jnp.argmax(before, axis=-1) == tokens[0]
        return (last_logits(after, valid), cache), (logprobs, greedy)

    (_, cache), (logprobs, greedy) = jax.lax.scan(step, (logits, cache), (tokens, valid))
    return logprobs, greedy, cache
