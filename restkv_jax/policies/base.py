"""What an eviction policy is, and what all policies with a window of queries share."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masked_eviction import select_slots
from restkv_jax.layer import LayerInputs

Granularity = Literal["kv_head", "query_head"]
GroupReduce = Literal["mean", "max"]


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

    def select(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Int[Array, "B J C"]:
        """Columns that stay, ascending, -1 for empty slots; `capacity` is at most T."""
        return select_slots(
            self.importance(layer, capacity, budget), capacity=capacity, budget=budget
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPolicy(Policy):
    """A policy that scores the past by the last W queries and always keeps the last W tokens.

    Attributes:
        window: W.
        granularity: "kv_head" keeps one set per key/value head, the true cost of grouped-query
            attention; "query_head" one per query head, as the reference does, at G times the
            memory.
        group_reduce: how a group of query heads is combined into one score for its key/value
            head, after pooling. Mean and maximum could not be told apart in quality; the mean is
            the default, as it commutes with average pooling.
    """

    window: int = 32
    granularity: Granularity = "kv_head"
    group_reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        """Refuses options that make no sense.

        Raises:
            ValueError: naming the option.
        """
        require(self.window >= 1, "window", "at least 1", self.window)
        require_choice("granularity", self.granularity, ("kv_head", "query_head"))
        require_choice("group_reduce", self.group_reduce, ("mean", "max"))

    @property
    def protected(self) -> int:
        """The window."""
        return self.window

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
        """Smoothed scores of the P = T - W columns before the window, per query head.

        Args:
            layer: the layer's attention.
            capacity: static upper bound of `budget`.
            budget: past tokens to keep in each row, the window not counted.
        """

    def importance(
        self, layer: LayerInputs, capacity: int, budget: Int[Array, " B"]
    ) -> Float[Array, "B J T"]:
        """Past scores by head, the window pinned, padding at -inf."""
        batch = layer.k.shape[0]
        window = min(self.window, layer.columns)
        past = layer.columns - window
        if past:
            scores = self.past_scores(layer, min(capacity - window, past), budget - window)
            if self.granularity == "kv_head":
                grouped = scores.reshape(batch, layer.spec.num_kv_heads, -1, past)
                scores = (jnp.mean if self.group_reduce == "mean" else jnp.max)(grouped, axis=2)
        else:
            heads = self.cache_heads(layer.spec.num_heads, layer.spec.num_kv_heads)
            scores = jnp.zeros((batch, heads, 0), jnp.float32)
        pinned = jnp.full((*scores.shape[:2], window), jnp.inf, scores.dtype)
        everything = jnp.concatenate([scores, pinned], axis=-1)
        return jnp.where(layer.valid[:, None], everything, -jnp.inf)


def require(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises ValueError naming the option unless `holds`."""
    if not holds:
        raise ValueError(f"{option}: expected {expected}, got {got!r}")


def require_choice(option: str, got: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError naming the option unless `got` is one of `choices`."""
    require(got in choices, option, "one of " + ", ".join(map(str, choices)), got)
