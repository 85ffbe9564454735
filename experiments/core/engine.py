"""The engine: one prefill for all policies, then each policy's generation, with its costs."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp

from experiments.core.compiled import let_programs_go
from experiments.core.errors import UserError
from experiments.core.measure import device_memory
from experiments.core.runner import Answer
from restkv_jax.cache import KVCache
from restkv_jax.decode import (
    CachePlan,
    CausalLM,
    Sampling,
    bucket_length,
    continue_from,
    extend,
    form_of,
    join_rows,
    last_logits,
    pad_prompts,
    prefill,
    with_output_factors,
)

# Decode steps between two looks at whether the answer has ended; answers are short.
_CHUNK = 4


class EvictionEngine:
    """Answers prompts from the compressed caches of several policies.

    Args:
        model: the network.
        plans: label -> plan.
        longest_prompt: tokens of the longest prompt that will come; checked against memory.
        weights_bytes: memory that the weights take.
        temperature: of sampling; 0 takes the most likely token.
        together: decode caches of one form as rows of one batch.

    Raises:
        UserError: a plan does not suit the model, or the caches of one row do not fit into
            memory.
    """

    def __init__(
        self,
        model: CausalLM,
        plans: Mapping[str, CachePlan],
        *,
        longest_prompt: int,
        weights_bytes: int,
        temperature: float = 0.0,
        together: bool = False,
    ) -> None:
        self._temperature = temperature
        self._together = together
        self._plans = dict(plans)
        check_fit(
            model,
            self._plans,
            bucket_length(longest_prompt),
            weights_bytes,
            copies=2 if together else 1,
        )
        self._model = with_output_factors(model)

    def answer(
        self,
        prompt_ids: list[int],
        *,
        policies: Sequence[str],
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        seed: int,
        min_new_tokens: int = 0,
        context_tokens: int | None = None,
    ) -> dict[str, Answer]:
        """Answers one prompt; see `experiments.core.runner.Engine`."""
        plans = tuple(self._plans[label] for label in policies)
        tokens, valid = pad_prompts([prompt_ids[:context_tokens]])
        question = [] if context_tokens is None else prompt_ids[context_tokens:]
        start = time.perf_counter()
        logits, caches = jax.block_until_ready(prefill(self._model, tokens, valid, plans=plans))
        prefill_s = time.perf_counter() - start
        held = dict(zip(policies, caches, strict=True))
        del caches  # a batch's own caches are freed once they are joined
        answers = {}
        for batch in self._batches(held):
            let_programs_go()
            # Before anything is decoded: decoding consumes the cache.
            kept = {label: (kept_slots(held[label]), held[label].total_bytes) for label in batch}
            own = [held.pop(label) for label in batch]
            cache = join_rows(own) if len(own) > 1 else own[0]
            del own
            start = time.perf_counter()
            after, cache = self._ask(question, jnp.tile(logits, (len(batch), 1)), cache)
            asked_s = time.perf_counter() - start
            start = time.perf_counter()
            rows = continue_from(
                self._model,
                after,
                cache,
                headroom=self._plans[batch[0]].headroom,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=self._temperature, min_new_tokens=min_new_tokens),
                seed=[seed % 2**31] * len(batch),
                stop_tokens=stop_ids,
                chunk=_CHUNK,
            ).rows()
            # A batch's time is shared out by tokens.
            token_s = (time.perf_counter() - start) / sum(map(len, rows))
            for label, row in zip(batch, rows, strict=True):
                answers[label] = Answer(
                    token_ids=row,
                    prefill_s=prefill_s + asked_s,
                    decode_s=token_s * len(row),
                    kept_slots=kept[label][0],
                    cache_bytes=kept[label][1],
                    decoded_with=len(batch),
                )
        return answers

    def _batches(self, caches: Mapping[str, KVCache]) -> list[list[str]]:
        """The labels whose caches are decoded from at once."""
        if not self._together:
            return [[label] for label in caches]
        batches: dict[Hashable, list[str]] = {}
        for label, cache in caches.items():
            batches.setdefault((form_of(cache), self._plans[label].headroom), []).append(label)
        return list(batches.values())

    def _ask(
        self, question: list[int], logits: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Feeds each row a question, possibly none; logits [B, V] that follow, and the cache."""
        # A cache that evicts while decoding takes so many tokens at once; others have the room.
        most = cache.room if cache.eviction is not None else None
        for start in range(0, len(question), most or len(question) or 1):
            piece = question[start:][:most]
            columns = min(bucket_length(len(piece)), most or sys.maxsize)
            tokens, valid = pad_prompts([piece] * logits.shape[0], columns=columns)
            after, cache = jax.block_until_ready(extend(self._model, cache, tokens, valid))
            logits = last_logits(after, jnp.asarray(valid))
        return logits, cache


def question_room(longest: int) -> int:
    """Headroom that a question of so many tokens needs, padding included."""
    return bucket_length(longest) if longest else 0


def check_fit(
    model: CausalLM,
    plans: Mapping[str, CachePlan],
    columns: int,
    weights_bytes: int,
    *,
    copies: int = 1,
) -> None:
    """Refuses plans that the model cannot follow, or whose caches cannot fit beside the weights.

    Everything is traced by shape alone, nothing is allocated.

    Args:
        model: the network.
        plans: label -> plan.
        columns: of the longest prompt, padding included.
        weights_bytes: memory that the weights take.
        copies: how often a cache exists at the same time.

    Raises:
        UserError: naming the policy, or the largest cache and what memory there is.
    """
    prompt = jax.ShapeDtypeStruct((1, columns), jnp.int32)
    sizes = {}
    for label, plan in plans.items():
        try:
            _, (cache,) = jax.eval_shape(
                functools.partial(prefill, plans=(plan,)),
                model,
                prompt,
                jax.ShapeDtypeStruct(prompt.shape, bool),
            )
        except ValueError as error:  # what a policy has to say of this model or budget
            raise UserError(f"--policy {label}: {error}") from None
        sizes[label] = cache.total_bytes
    available = device_memory()
    needed = copies * sum(sizes.values()) + weights_bytes
    if available is not None and needed > available:
        largest = max(sizes, key=lambda label: sizes[label])
        raise UserError(
            f"--budget: caches of {copies * sum(sizes.values()) / 1e9:.2f} GB and weights of "
            f"{weights_bytes / 1e9:.2f} GB do not fit into {available / 1e9:.2f} GB of memory; the "
            f"largest cache is that of {largest} with {sizes[largest] / 1e9:.2f} GB"
        )


def kept_slots(cache: KVCache) -> float:
    """Filled slots, mean over layers and heads."""
    filled = [jnp.sum(stack.positions >= 0) for stack in cache.stacks]
    heads = sum(stack.used.size * stack.heads for stack in cache.stacks)
    return float(sum(filled)) / heads
