"""One token a step from a compressed cache, and many steps in one `lax.scan`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels import bits
from pallas_kernels.varying import vary_like
from restkv_jax.cache import KVCache
from restkv_jax.feed import feed
from restkv_jax.protocols import CausalLM
from restkv_jax.sampling import GREEDY, Sampling, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeState:
    """What decoding carries from step to step.

    Attributes:
        cache: keys and values of everything before `token`.
        token: int32 [B] the newest token, not yet in the cache.
        logprob: float32 [B] its log-probability under the model, renormalised without the stop
            tokens where `min_new_tokens` bars them.
        produced: int32 [B] tokens drawn so far, `token` counted.
        limit: int32 [B] how many each row may draw.
        done: bool [B] rows that drew a stop token or reached their limit.
        keys: [B] random keys.
    """

    cache: KVCache
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    produced: Int[Array, " B"]
    limit: Int[Array, " B"]
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]


def decode_step(
    model: CausalLM, cache: KVCache, token: Int[Array, " B"], active: Bool[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Feeds one token per row.

    Args:
        model: see `CausalLM`.
        cache: at least one empty slot in each active row, in the layers that are no rings, unless
            the cache evicts while decoding.
        token: the tokens to feed.
        active: False for rows that must stay as they are; their logits mean nothing.

    Returns:
        float32 logits of the token that follows, and the cache with `token` in it.
    """
    hidden, cache = feed(model, cache, token[:, None], active[:, None])
    return model.unembed(hidden[:, 0]).astype(jnp.float32), cache


@functools.partial(jax.jit, static_argnames=("sampling",))
def init_decode(
    logits: Float[Array, "B V"],
    cache: KVCache,
    keys: Key[Array, " B"],
    limit: Int[Array, " B"],
    stop_tokens: Int[Array, " E"],
    *,
    sampling: Sampling = GREEDY,
) -> DecodeState:
    """Draws each row's first token from the prompt's logits.

    Args:
        logits: of the prompt's last token.
        cache: the compressed prompt.
        keys: one per row, see `row_keys`.
        limit: tokens that each row may draw, at least 1; the cache's headroom must hold them.
        stop_tokens: tokens that end a row; -1 entries never match.
        sampling: how tokens are drawn.
    """
    batch = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        logprob=jnp.zeros(batch, jnp.float32),
        produced=jnp.zeros(batch, jnp.int32),
        limit=limit,
        done=limit < 1,
        keys=keys,
    )
    return _draw(state, logits, stop_tokens, sampling)


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames=("state",))
def decode_chunk(
    model: CausalLM,
    state: DecodeState,
    stop_tokens: Int[Array, " E"],
    *,
    steps: int,
    sampling: Sampling = GREEDY,
) -> tuple[DecodeState, Int[Array, "B C"], Float[Array, "B C"]]:
    """Runs `steps` decode steps in one `lax.scan`; the state is donated.

    Args:
        model: see `CausalLM`.
        state: consumed.
        stop_tokens: tokens that end a row.
        steps: C, static.
        sampling: how tokens are drawn, static.

    Returns:
        The new state, and the tokens drawn with their log-probabilities; -1 and 0 for rows that
        were done before. The first token of all is not among them: it is `init_decode`'s.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array]]:
        active = ~state.done
        logits, cache = decode_step(model, state.cache, state.token, active)
        state = _draw(dataclasses.replace(state, cache=cache), logits, stop_tokens, sampling)
        drawn = jnp.where(active, state.token, -1), jnp.where(active, state.logprob, 0.0)
        return state, drawn

    state = vary_like(state, state)  # a step mixes its parts
    state, (tokens, logprobs) = bits.scan(step, state, length=steps)
    return state, tokens.T, logprobs.T


def _draw(
    state: DecodeState,
    logits: Float[Array, "B V"],
    stop_tokens: Int[Array, " E"],
    sampling: Sampling,
) -> DecodeState:
    active = ~state.done
    if sampling.min_new_tokens:
        early = state.produced < sampling.min_new_tokens
        barred = jnp.where(early[:, None], -jnp.inf, 0.0)
        logits = logits.at[:, stop_tokens].add(barred, mode="drop", wrap_negative_indices=False)
    if sampling.temperature > 0.0:
        pairs = jax.vmap(jax.random.split)(state.keys)
        keys, draw = pairs[:, 0], pairs[:, 1]
    else:
        keys = draw = state.keys
    token, logprob = sample(logits, draw, sampling)
    produced = state.produced + active
    stopped = jnp.any(token[:, None] == stop_tokens, axis=-1)
    return dataclasses.replace(
        state,
        token=jnp.where(active, token, state.token),
        logprob=jnp.where(active, logprob, 0.0),
        produced=produced,
        done=state.done | (active & stopped) | (produced >= state.limit),
        keys=keys,
    )
