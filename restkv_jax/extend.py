"""Several given tokens on top of a cache: questions about a compressed context, scored answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from restkv_jax.cache import KVCache
from restkv_jax.feed import feed
from restkv_jax.protocols import CausalLM


@jax.jit
def extend(
    model: CausalLM,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Feeds given tokens; the cache that was passed stays as it is.

    One compressed context answers any number of questions: each call starts from the same cache,
    and `join_rows([cache] * n)` takes n of them at once, a row each.
    Logits of T tokens are held at once; give long texts in pieces.

    Args:
        model: see `CausalLM`.
        cache: room for T tokens in each row: headroom, or `evict_every` slots if it evicts while
            decoding. `KVCache.free` tells how many each row can still take; a row that is given
            more loses some, and only the static bound can be checked here.
        tokens: what follows each row of the cache, padded on either side.
        valid: False for padding; every token counts by default. Rows without any are left alone.

    Returns:
        float32 logits of what follows each token (those of padding mean nothing), and the cache
        with the tokens in it.

    Raises:
        ValueError: more tokens than any row has room for, none, or not a row of them for each of
            the cache.
    """
    if valid is None:
        valid = jnp.ones(tokens.shape, bool)
    room = cache.room
    if room is not None and tokens.shape[-1] > room:
        raise ValueError(f"tokens: {tokens.shape[-1]} columns do not fit a room of {room} tokens")
    hidden, cache = feed(model, cache, tokens, valid)
    return model.unembed(hidden).astype(jnp.float32), cache


@jax.jit
def score_tokens(
    model: CausalLM,
    logits: Float[Array, "B V"],
    cache: KVCache,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], KVCache]:
    """Log-probabilities of given tokens from an evicted cache, each fed before the next.

    Args:
        model: see `CausalLM`.
        logits: of the last token in the cache, from `prefill` or `extend`.
        cache: see `extend`.
        tokens: what to score, padded on the right.
        valid: False for padding.

    Returns:
        log p of each token, 0 for padding, and the cache with the tokens in it.
    """
    if valid is None:
        valid = jnp.ones(tokens.shape, bool)
    after, cache = extend(model, cache, tokens, valid)
    before = jnp.concatenate([logits[:, None], after[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(before, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(valid, chosen - jax.nn.logsumexp(before, axis=-1), 0.0), cache


def last_logits(logits: Float[Array, "B T V"], valid: Bool[Array, "B T"]) -> Float[Array, "B V"]:
    """Of each row's last valid token: what `init_decode` goes on from."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
