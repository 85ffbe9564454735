"""Prompts in, tokens out: validation, padding, prefill, and the loop over decode chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from restkv_jax.arguments import token_ids, whole_number
from restkv_jax.cache import KVCache
from restkv_jax.decode_loop import decode_chunk, init_decode
from restkv_jax.plan import CachePlan
from restkv_jax.prefill import prefill
from restkv_jax.protocols import CausalLM
from restkv_jax.sampling import GREEDY, Sampling, Seed, row_keys

# Decode steps between two looks at whether all rows are done.
CHUNK = 32
_LARGEST_ID = np.iinfo(np.int32).max


# Token ids of each row; an array [B, T] is one of rows equally long.
Prompts = Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns, on the host.

    Attributes:
        tokens: int32 [B, M] drawn tokens, a stop token included; -1 after a row's end.
        logprobs: float32 [B, M] their log-probabilities under the model, 0 after a row's end.
        lengths: int32 [B] tokens drawn in each row.
        cache: the cache as the last step left it; it holds all tokens but each row's last.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    cache: KVCache

    def rows(self) -> list[list[int]]:
        """Each row's tokens without the padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def bucket_length(length: int, *, least: int = 64) -> int:
    """The column count to pad a prompt to: 64, 96, 128, 192, 256, 384, ...

    Two sizes per octave bound both the padding (a third at most) and the number of programs
    that get compiled.
    """
    if length <= least:
        return least
    octave = 1 << (length - 1).bit_length()
    return octave * 3 // 4 if length <= octave * 3 // 4 else octave


def pad_prompts(prompts: Prompts, *, columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads prompts to one of the lengths of `bucket_length`, or to `columns`.

    Returns:
        int32 tokens [B, T] and a bool mask [B, T], True for tokens.

    Raises:
        ValueError: no prompts, an empty one, one that is no row of token ids, or one longer than
            `columns`.
    """
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one")
    rows = [token_ids(f"prompts: prompt {i}", prompt) for i, prompt in enumerate(prompts)]
    lengths = [len(row) for row in rows]
    if min(lengths) == 0:
        raise ValueError(f"prompts: prompt {lengths.index(0)} is empty")
    columns = bucket_length(max(lengths)) if columns is None else columns
    if max(lengths) > columns:
        raise ValueError(f"prompts: one has {max(lengths)} tokens, more than {columns} columns")
    tokens = np.zeros((len(rows), columns), np.int64)
    valid = np.arange(columns) >= columns - np.asarray(lengths)[:, None]
    for into, row in zip(tokens, rows, strict=True):
        into[columns - len(row) :] = row
    for one in (tokens.min(), tokens.max()):
        if not 0 <= one <= _LARGEST_ID:
            raise ValueError(f"prompts: expected token ids from 0 to {_LARGEST_ID}, got {one}")
    return tokens.astype(np.int32), valid


def generate(
    model: CausalLM,
    prompts: Prompts,
    *,
    plan: CachePlan,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: Seed = 0,
    stop_tokens: Sequence[int] = (),
    chunk: int = CHUNK,
) -> Generation:
    """Answers a batch of prompts from evicted caches.

    Args:
        model: see `CausalLM`.
        prompts: token ids, rows of any lengths.
        plan: policy and budget; its headroom must hold `max_new_tokens`, unless it evicts while
            decoding.
        max_new_tokens: most tokens to draw in each row.
        sampling: how tokens are drawn.
        seed: row b draws with seed + b, so that it equals the row run alone with that seed; or one
            for each row.
        stop_tokens: tokens that end a row.
        chunk: decode steps between two looks at whether all rows are done; rows that are done
            idle through the rest of it.

    Raises:
        ValueError: prompts that are empty or hold what is no token of the model, a limit that the
            headroom cannot hold, or what `continue_from` refuses.
    """
    tokens, valid = pad_prompts(prompts)
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    if tokens.max() >= logits.shape[1]:  # only the logits tell how many tokens a model has
        raise ValueError(
            f"prompts: expected token ids below {logits.shape[1]}, the model's vocabulary, got "
            f"{tokens.max()}"
        )
    return continue_from(
        model,
        logits,
        cache,
        headroom=plan.headroom,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        chunk=chunk,
    )


def continue_from(
    model: CausalLM,
    logits: jax.Array,
    cache: KVCache,
    *,
    headroom: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: Seed = 0,
    stop_tokens: Sequence[int] = (),
    chunk: int = CHUNK,
) -> Generation:
    """Decodes from a prefilled cache, which is consumed.

    Args:
        model: see `CausalLM`.
        logits: [B, V] of the prompts' last tokens.
        cache: consumed.
        headroom: empty slots of the cache; a cache that evicts while decoding needs none.
        max_new_tokens: most tokens to draw in each row.
        sampling: how tokens are drawn.
        seed: row b draws with seed + b; or one for each row.
        stop_tokens: tokens that end a row.
        chunk: decode steps between two looks at whether all rows are done.

    Raises:
        ValueError: `max_new_tokens` below 1 or above what the headroom holds, `chunk` below 1, stop
            tokens that are no token ids, or not one seed for each row.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    chunk = whole_number("chunk", chunk, least=1)
    stops = jnp.asarray([-1, *token_ids("stop_tokens", stop_tokens)], jnp.int32)
    if cache.eviction is None and max_new_tokens > headroom:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} tokens do not fit the cache's headroom of {headroom}"
        )
    batch = logits.shape[0]
    limit = jnp.full(batch, max_new_tokens, jnp.int32)
    keys = row_keys(seed, batch)
    state = init_decode(logits, cache, keys, limit, stops, sampling=sampling)
    tokens = [np.asarray(state.token)[:, None]]
    logprobs = [np.asarray(state.logprob)[:, None]]
    drawn = 1
    while drawn < max_new_tokens and not bool(jnp.all(state.done)):
        state, new, new_logprobs = decode_chunk(model, state, stops, steps=chunk, sampling=sampling)
        tokens.append(np.asarray(new))
        logprobs.append(np.asarray(new_logprobs))
        drawn += chunk
    lengths = np.asarray(state.produced)
    width = int(lengths.max())
    return Generation(
        tokens=np.concatenate(tokens, axis=1)[:, :width],
        logprobs=np.concatenate(logprobs, axis=1)[:, :width],
        lengths=lengths,
        cache=state.cache,
    )
