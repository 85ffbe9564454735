"""What an eviction policy is, and what all policies with a window of queries share."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masked_eviction import select_slots
from restkv_jax.layer import LayerInputs

Granularity = Literal["kv_head", "query_head"]
GroupReduce = Literal["mean", "max"]

# `query_rows` of a policy that looks at every query of the prompt, however long.
ALL_QUERIES = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """A frozen, hashable configuration with pure methods; static under `jit`.

    Attributes:
        name: what the policy is called on command lines and in results.
        needs_budget: False if the policy keeps everything.
    """

    name: ClassVar[str]
    needs_budget: ClassVar[bool] = True

    @property
    def protected(self) -> int:
        """Tokens that are kept whatever the scores say; a budget must be larger."""
        return 0

    @property
    def query_rows(self) -> int:
        """How many of the last queries the policy looks at."""
        return 0

    def cache_heads(self, num_heads: int, num_kv_heads: int) -> int:
        """J, heads that keep a set of their own: K unless the policy says otherwise."""
        del num_heads
        return num_kv_heads

    @property
    def accumulates(self) -> bool:
        """Whether `carry` is the attention that each entry has received so far.

        Decoding then adds to it at every step.
        """
        return False

    @property
    def carries(self) -> bool:
        """Whether `carry` returns anything."""
        return self.accumulates

    def carry(self, layer: LayerInputs) -> Float[Array, "B N T"] | None:
        """What the next eviction gets as `layer.carried`, at least 0; None if it needs nothing."""
        del layer
        return None

    @abc.abstractmethod
    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B J T"]:
        """Importance of every column: +inf for what is always kept, -inf for padding.

        Args:
            layer: the layer's attention.
            capacity: static upper bound of `budget`.
            budget: slots that each row may fill.
        """

    @property
    def selects_by_importance(self) -> bool:
        """Whether `select` takes the largest importances, as it does unless it is overridden.

        Selection and moving are then one op.
        """
        return type(self).select is Policy.select

    def select(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Int[Array, "B J C"]:
        """Columns that stay, ascending, -1 for empty slots; `capacity` is at most T."""
        return select_slots(
            self.importance(layer, capacity, budget), capacity=capacity, budget=budget
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPolicy(Policy):
    """A policy that scores the past by the last W queries and always keeps the last tokens.

    The queries are the prompt's own last ones, or those of a probe that follows it
    (`LayerInputs.probe`).

    Attributes:
        scores_by_budget: True if the past's scores depend on how many of it are kept.
        window: W, the queries that score.
        recent: tokens at the end that are always kept; None keeps W of them. With fewer, tokens
            of the window are scored too, by those of its queries that see them.
        sinks: tokens at the start that are always kept and stay out of the pooling, so that the
            weight that they attract does not spread to their neighbours.
        granularity: "kv_head" keeps one set per key/value head, the true cost of grouped-query
            attention; "query_head" one per query head, as the reference does, at G times the
            memory.
        group_reduce: how a group of query heads is combined into one score for its key/value
            head, after pooling. Mean and maximum could not be told apart in quality; the mean is
            the default, as it commutes with average pooling.
    """

    scores_by_budget: ClassVar[bool] = False

    window: int = 32
    recent: int | None = None
    sinks: int = 0
    granularity: Granularity = "kv_head"
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        require(self.window >= 1, "window", "at least 1", self.window)
        require(self.recent is None or self.recent >= 0, "recent", "at least 0", self.recent)
        require(self.sinks >= 0, "sinks", "at least 0", self.sinks)
        require_choice("granularity", self.granularity, ("kv_head", "query_head"))
        require_choice("group_reduce", self.group_reduce, ("mean", "max"))

    @property
    def recent_tokens(self) -> int:
        """How many tokens at the end are always kept."""
        return self.window if self.recent is None else self.recent

    @property
    def protected(self) -> int:
        """The recent tokens and the sinks."""
        return self.recent_tokens + self.sinks

    @property
    def query_rows(self) -> int:
        """The window."""
        return self.window

    def cache_heads(self, num_heads: int, num_kv_heads: int) -> int:
        """K or N, by granularity."""
        return num_kv_heads if self.granularity == "kv_head" else num_heads

    @abc.abstractmethod
    def past_scores(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B N P"]:
        """Smoothed scores of the P columns before the recent tokens, per query head.

        Args:
            layer: the layer's attention.
            capacity: static upper bound of `budget`.
            budget: past tokens to keep in each row, recent ones and sinks not counted.
        """

    def past_columns(self, layer: LayerInputs) -> int:
        """P, the columns before the recent tokens."""
        return max(layer.columns - self.recent_tokens, 0)

    def poolable(self, layer: LayerInputs) -> Bool[Array, "B M P"]:
        """True for the past columns that pooling may look at: tokens, but no sinks."""
        past = layer.positions[..., : self.past_columns(layer)]
        return layer.by_query_head(past >= self.sinks)

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B J T"]:
        """Past scores by head, the recent tokens and the sinks pinned, padding at -inf."""
        past = self.past_columns(layer)
        recent = layer.columns - past
        if past:
            # At least 1: rows that the protected tokens fill still need scores that are numbers.
            most = max(min(capacity - self.protected, past), 1)
            past_budget = jnp.clip(budget - self.protected, 1, most)
            if self.scores_by_budget:
                scores = self.past_scores(layer, most, past_budget)
            else:
                scores = layer.once(self, lambda: self.past_scores(layer, most, past_budget))
            if self.granularity == "kv_head":
                scores = reduce_groups(scores, layer.spec.num_kv_heads, self.group_reduce)
        else:
            heads = self.cache_heads(layer.spec.num_heads, layer.spec.num_kv_heads)
            scores = jnp.zeros((layer.k.shape[0], heads, 0), jnp.float32)
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, recent)))
        return pin(scores, layer, sinks=self.sinks, recent=recent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPolicy(Policy):
    """A policy that scores every token on its own; what it forces is up to the caller.

    Attributes:
        sinks: tokens at the start that are always kept.
        recent: tokens at the end that are always kept.
    """

    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        require(self.sinks >= 0, "sinks", "at least 0", self.sinks)
        require(self.recent >= 0, "recent", "at least 0", self.recent)

    @property
    def protected(self) -> int:
        """The sinks and the recent tokens."""
        return self.sinks + self.recent

    @abc.abstractmethod
    def token_scores(self, layer: LayerInputs) -> Float[Array, "B J T"]:
        """Scores of all columns, those of padding without meaning; J may be 1 for all heads."""

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B J T"]:
        """Scores, what is forced pinned, padding at -inf."""
        del capacity, budget
        scores = layer.once(self, lambda: self.token_scores(layer))
        scores = pin(scores, layer, sinks=self.sinks, recent=self.recent)
        heads = self.cache_heads(layer.spec.num_heads, layer.spec.num_kv_heads)
        return jnp.broadcast_to(scores, (scores.shape[0], heads, layer.columns))


def pin(
    scores: Float[Array, "B J T"], layer: LayerInputs, *, sinks: int, recent: int
) -> Float[Array, "B J T"]:
    """Puts the first and the last tokens of each row at +inf, padding at -inf."""
    positions = layer.positions
    if scores.shape[1] > layer.spec.num_kv_heads:
        positions = layer.by_query_head(positions)
    forced = (positions < sinks) | (jnp.arange(layer.columns) >= layer.columns - recent)
    scores = jnp.where(forced, jnp.inf, scores)
    return jnp.where(positions >= 0, scores, -jnp.inf)


def reduce_groups(
    scores: Float[Array, "B N P"], num_kv_heads: int, how: GroupReduce
) -> Float[Array, "B K P"]:
    """One score for each group of query heads that shares a key/value head."""
    grouped = scores.reshape(scores.shape[0], num_kv_heads, -1, scores.shape[-1])
    return (jnp.mean if how == "mean" else jnp.max)(grouped, axis=2)


def require(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises ValueError naming the option unless `holds`."""
    if not holds:
        raise ValueError(f"{option}: expected {expected}, got {got!r}")


def require_choice(option: str, got: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError naming the option unless `got` is one of `choices`."""
    require(got in choices, option, "one of " + ", ".join(map(str, choices)), got)
