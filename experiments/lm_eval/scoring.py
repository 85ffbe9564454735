"""What the harness asks of a model, answered for all policies at once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.core.engine import EvictionEngine, kept_slots, question_room
from experiments.core.likelihood import follow
from experiments.core.options import Budget, PolicyText
from experiments.core.plans import make_plan
from experiments.core.storage import RowFile
from experiments.core.table import TextTable, human_bytes
from models import LanguageModel
from restkv_jax.decode import (
    CachePlan,
    pad_prompts,
    prefill,
    with_output_factors,
)

FirstToken = Literal["evicted", "prefill"]

# A context and one of the texts that may follow it, in tokens.
Pair = tuple[tuple[int, ...], tuple[int, ...]]

# Tokens of continuations that go through the model at once: multiple-choice answers are short.
_PIECE = 16


class Scorer:
    """Scores continuations and generates, one prefill of a context for all policies.

    The harness asks for one policy after the other. What the later ones will be asked is computed
    along with the first one and remembered.

    Args:
        language_model: the model.
        policies: as the user wrote them, in the order in which the harness asks for them.
        budget: of the run.
        first_token: "evicted" compresses the context without its last token, which is then fed to
            the evicted cache, so that all of a continuation is predicted from there. "prefill"
            compresses the whole context; the first token of a continuation, and so all of a
            one-token answer, is then predicted by the full prefill, whatever the policy.
        compression: policy -> where to write down what each context was compressed to.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        policies: Sequence[PolicyText],
        budget: Budget,
        *,
        first_token: FirstToken = "evicted",
        compression: Mapping[str, RowFile] | None = None,
    ) -> None:
        self.language_model = language_model
        self.model = with_output_factors(language_model.model)
        self._policies = {policy.label: policy for policy in policies}
        self._budget = budget
        self._held_back = int(first_token == "evicted")
        self._compression = compression
        self._pairs: dict[str, dict[Pair, tuple[float, bool]]] = {p: {} for p in self._policies}
        self._engines: dict[int, EvictionEngine] = {}
        # End strings of answers -> tokens that hold one, see `stop_tokens`.
        self.stops: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._texts: dict[str, dict[Any, list[int]]] = {p: {} for p in self._policies}

    def pairs(self, label: str, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, tuple[float, bool]]]:
        """Log-likelihoods of continuations, context by context.

        Args:
            label: the policy.
            pairs: contexts of at least one token, and continuations of at least one.

        Yields:
            Each different pair, the sum of its continuation's log-probabilities in nats, and
            whether every token of it was the most likely one.
        """
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for context, continuation in dict.fromkeys(pairs):
            groups.setdefault(context, []).append(continuation)
        # One room for all: every other one would compile again.
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        headroom = _width(longest + self._held_back)
        for context, continuations in groups.items():
            known = self._pairs[label]
            if any((context, continuation) not in known for continuation in continuations):
                self._score(label, context, continuations, headroom)
            for continuation in continuations:
                yield (context, continuation), known[context, continuation]

    def generation(
        self, label: str, prompt: tuple[int, ...], *, tokens: int, stop_ids: tuple[int, ...]
    ) -> list[int]:
        """At most `tokens` tokens that follow a prompt, by greedy decoding."""
        key = (prompt, tokens, stop_ids)
        if key not in self._texts[label]:
            held = min(self._held_back, len(prompt) - 1)
            answers = self._engine(tokens, len(prompt)).answer(
                list(prompt),
                policies=self._from(label),
                max_new_tokens=tokens,
                stop_ids=stop_ids,
                seed=0,
                context_tokens=len(prompt) - held if held else None,
            )
            for other, answer in answers.items():
                self._texts[other][key] = answer.token_ids
                size = len(prompt) - held
                self.note(other, prompt, size, answer.kept_slots, answer.cache_bytes)
        return self._texts[label][key]

    def note(
        self, label: str, context: tuple[int, ...], tokens: int, kept: float, size: int
    ) -> None:
        """Writes down what a context, or a window of a whole text, was compressed to.

        Args:
            label: the policy.
            context: by which it is known.
            tokens: how many the cache has seen.
            kept: filled slots, mean over layers and heads.
            size: bytes of the cache.
        """
        if self._compression is not None:
            digest = hashlib.sha256(np.asarray(context, np.int32).tobytes()).hexdigest()[:16]
            row = {"context": digest, "tokens": tokens, "kept": kept, "bytes": size}
            self._compression[label].append(row)

    def _score(
        self,
        label: str,
        context: tuple[int, ...],
        continuations: Sequence[tuple[int, ...]],
        headroom: int,
    ) -> None:
        labels = self._from(label)
        plans = self._plans(labels, headroom)
        # A context of one token has nothing to evict, and is not held back.
        held = min(self._held_back, len(context) - 1)
        prompt = context[: len(context) - held]
        logits, caches = prefill(
            self.model, *pad_prompts([prompt]), plans=tuple(plans[other] for other in labels)
        )
        for other, cache in zip(labels, caches, strict=True):
            self.note(other, context, len(prompt), kept_slots(cache), cache.total_bytes)
            for continuation in continuations:
                rest = [*context[len(prompt) :], *continuation]
                width = _width(len(rest))
                found = follow(
                    self.model, logits, cache, rest, piece=_PIECE, pieces=width // _PIECE
                )
                logprobs, greedy = found.logprobs[held:], found.greedy[held:]
                total = float(np.sum(logprobs, dtype=np.float64))
                self._pairs[other][context, continuation] = (total, bool(greedy.all()))

    def _engine(self, tokens: int, longest: int) -> EvictionEngine:
        if tokens not in self._engines:
            self._engines[tokens] = EvictionEngine(
                self.language_model.model,
                self._plans(list(self._policies), tokens + question_room(self._held_back)),
                longest_prompt=longest,
                weights_bytes=self.language_model.weights_bytes,
            )
        return self._engines[tokens]

    def _from(self, label: str) -> list[str]:
        """The policy and those that will be asked for after it."""
        labels = list(self._policies)
        return labels[labels.index(label) :]

    def _plans(self, labels: Sequence[str], headroom: int) -> dict[str, CachePlan]:
        return {
            label: make_plan(self._policies[label], self._budget, headroom=headroom)
            for label in labels
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """What contexts and windows of whole texts were compressed to, each different one counted once.

    Attributes:
        contexts: how many.
        evicted: how many of them lost an entry.
        tokens: mean length.
        kept: mean of the filled slots, over layers and heads.
        cache_bytes: mean size of the cache, its room for what follows included.
    """

    contexts: int
    evicted: int
    tokens: float
    kept: float
    cache_bytes: float

    @property
    def factor(self) -> float:
        """Tokens for each slot that is kept: the effective compression; of one context at least."""
        return self.tokens / self.kept


def read_compression(file: RowFile) -> Compression:
    """Sums up what a `Scorer` wrote down, also in earlier runs."""
    rows = list({row["context"]: row for row in file.load()}.values())

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / max(len(rows), 1)

    return Compression(
        contexts=len(rows),
        evicted=sum(row["kept"] < row["tokens"] for row in rows),
        tokens=mean("tokens"),
        kept=mean("kept"),
        cache_bytes=mean("bytes"),
    )


def compression_table(compression: Mapping[str, Compression]) -> TextTable:
    """Policy x what contexts and windows were compressed to; "-" where none was written down."""
    columns = ("policy", "contexts", "evicted", "tokens", "kept slots", "compression", "cache")
    rows = tuple((policy, *_cells(found)) for policy, found in compression.items())
    return TextTable("effective compression of contexts and whole texts, means", columns, rows)


def _cells(found: Compression) -> tuple[str, ...]:
    if not found.contexts:
        return "0", *["-"] * 5
    return (
        str(found.contexts),
        str(found.evicted),
        f"{found.tokens:.1f}",
        f"{found.kept:.1f}",
        f"{found.factor:.2f}x",
        human_bytes(found.cache_bytes),
    )


def stop_tokens(
    until: Sequence[str], vocab_size: int, decode: Callable[[list[int]], str]
) -> tuple[int, ...]:
    """Tokens whose own text holds one of the strings that end an answer."""
    if not until:
        return ()
    texts = ((token, decode([token])) for token in range(vocab_size))
    return tuple(token for token, text in texts if any(stop in text for stop in until))


def _width(tokens: int) -> int:
    """Room for so many tokens: a power of two of pieces, because each number of them compiles."""
    return _PIECE << (-(-tokens // _PIECE) - 1).bit_length()
