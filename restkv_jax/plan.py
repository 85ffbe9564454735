"""A cache's plan: which policy, how many slots, how much room for new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from restkv_jax import budget as budgets
from restkv_jax.allocation import FrozenHeads, HeadAllocation
from restkv_jax.arguments import whole_number
from restkv_jax.budget import Budget
from restkv_jax.policies import Policy, Streaming
from restkv_jax.policies.base import ALL_QUERIES, require
from restkv_jax.protocols import LayerSpec

# The last tokens and nothing else: all that a layer with a sliding window can see.
_LAST = Streaming(sinks=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeEviction:
    """What happens when a cache is full: each layer is brought down to the budget.

    Attributes:
        policy: decides what stays, by the last queries.
        budget: slots a head that stay.
    """

    policy: Policy
    budget: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Everything static about a compressed cache; frozen and hashable.

    Policy, budget and headroom are those of the layers that see everything. A layer with a
    sliding window of w tokens holds the last w whatever they are, even if the budget is smaller:
    w is all that it ever needs, and less would change what it computes. So a model whose layers
    all slide is evicted by its windows alone.

    Attributes:
        policy: what is kept.
        budget: slots a head for the prompt, or a ratio of the prompt, or one of them for each
            layer; None for policies that keep everything.
        layers: how one budget is spread over the layers: "uniform", or "pyramid" (PyramidKV:
            many slots at the bottom, few at the top, about the same number on average: its slope
            is rounded down, which can add half a slot a layer for each layer). The pyramid is
            that of the padded prompt; a row that is shorter keeps at most its layer's slots.
        heads: how a layer's slots are spread over its heads, see `HeadAllocation`; None gives
            every head the same number.
        headroom: slots for tokens that follow the prompt; without effect if `decode_budget` is
            given.
        decode_budget: evict while decoding, however long it runs: whenever `evict_every` tokens
            have filled the slots behind it, each head goes down to this budget again.
        evict_every: slots for new tokens between two evictions.
        rope: "true" leaves every key at the position of its token; "slot" turns it to the number
            of its slot, and new tokens follow the slots, so that no position exceeds the cache's
            size (as in LaCache and StreamingLLM). For policies that look at no queries.
        storage: "model" keeps K/V in the model's dtype, "int8" as 8-bit integers with a float32
            scale for each head's entry.
    """

    policy: Policy
    budget: Budget | tuple[Budget, ...] | None = None
    layers: Literal["uniform", "pyramid"] = "uniform"
    heads: HeadAllocation | None = None
    headroom: int = 128
    decode_budget: int | None = None
    evict_every: int = 64
    rope: Literal["true", "slot"] = "true"
    storage: Literal["model", "int8"] = "model"

    def __post_init__(self) -> None:
        """Refuses a budget that the policy cannot meet; integers of numpy become Python's.

        Raises:
            ValueError: naming the option, and what was expected.
        """
        policy, heads = self.policy, self.heads
        require(isinstance(policy, Policy), "policy", "a policy such as RestKV()", policy)
        if not (heads is None or isinstance(heads, HeadAllocation)):
            raise ValueError(
                f"heads: expected an allocation such as AdaKV(), or None, got {heads!r}"
            )
        self._set("headroom", whole_number("headroom", self.headroom, least=0))
        if self.layers not in ("uniform", "pyramid"):
            raise ValueError(f"layers: expected uniform or pyramid, got {self.layers!r}")
        if self.storage not in ("model", "int8"):
            raise ValueError(f"storage: expected model or int8, got {self.storage!r}")
        self._check_decoding()
        self._check_rope()
        if isinstance(self.heads, FrozenHeads) and (
            isinstance(self.budget, tuple | float) or self.layers != "uniform"
        ):
            raise ValueError("heads: frozen budgets are by layer already; give one whole budget")
        if isinstance(self.heads, FrozenHeads):
            least = min(min(heads) for heads in self.heads.slots)
            if least < self.policy.protected:
                raise ValueError(
                    f"heads: a head with {least} slots does not hold the {self.policy.protected} "
                    f"tokens that policy {self.policy.name!r} always keeps"
                )
        if not self.policy.needs_budget:
            if self.budget is not None:
                raise ValueError(f"budget: policy {self.policy.name!r} keeps everything")
        elif self.budget is None:
            raise ValueError(f"budget: policy {self.policy.name!r} needs one")
        else:
            by_layer = isinstance(self.budget, tuple)
            if by_layer and self.layers != "uniform":
                raise ValueError(f"layers: the budget already has one entry a layer: {self.budget}")
            if by_layer and not self.budget:
                raise ValueError("budget: expected one for each layer, got none")
            window = self.policy.protected
            if isinstance(self.budget, tuple):
                found = tuple(budgets.checked_budget(one, window=window) for one in self.budget)
                self._set("budget", found)
            else:
                self._set("budget", budgets.checked_budget(self.budget, window=window))

    def _set(self, option: str, value: object) -> None:
        object.__setattr__(self, option, value)

    def _check_decoding(self) -> None:
        if self.decode_budget is None:
            return
        if not self.policy.needs_budget:
            raise ValueError(f"decode_budget: policy {self.policy.name!r} keeps everything")
        if self.heads is not None:
            raise ValueError("decode_budget: expected equal budgets of the heads, got `heads` too")
        if self.policy.query_rows == ALL_QUERIES and not self.policy.accumulates:
            raise ValueError(
                f"decode_budget: {self.policy.name!r} as set here looks at all queries of a prompt "
                "at once, which decoding cannot show it"
            )
        slots = budgets.checked_slots(
            "decode_budget", self.decode_budget, window=self.policy.protected
        )
        self._set("decode_budget", slots)
        self._set("evict_every", whole_number("evict_every", self.evict_every, least=1))

    def _check_rope(self) -> None:
        if self.rope not in ("true", "slot"):
            raise ValueError(f"rope: expected true or slot, got {self.rope!r}")
        if self.rope == "true":
            return
        if self.policy.query_rows > 0 or self.heads is not None or self.layers != "uniform":
            raise ValueError(
                f"rope: positions by slot are for policies that look at no queries, with equal "
                f"budgets of all layers and heads; got {self.policy.name!r}"
            )
        if isinstance(self.budget, tuple) or self.storage != "model":
            raise ValueError("rope: positions by slot need one budget, and K/V as they are")

    @property
    def eviction(self) -> DecodeEviction | None:
        """What a cache of this plan does when it is full."""
        if self.decode_budget is None:
            return None
        return DecodeEviction(policy=self.policy, budget=self.decode_budget)

    @property
    def remembered(self) -> int:
        """How many of the last queries a cache of this plan keeps for the next eviction."""
        needed = self.eviction is not None and not self.policy.accumulates
        return self.policy.query_rows if needed else 0

    def for_layer(self, spec: LayerSpec, columns: int) -> CachePlan:
        """This plan, or for a layer with a sliding window the plan of its ring buffer.

        A ring needs no headroom: it has a slot for each token of the window, or for each token
        that there can be if those are fewer. There can be any number if eviction goes on while
        decoding.
        """
        if spec.window is None:
            return self
        slots = spec.window
        if self.decode_budget is None:
            slots = min(slots, columns + self.headroom)
        return CachePlan(policy=_LAST, budget=slots, headroom=0, storage=self.storage)

    def layer_budget(self, layer: int, num_layers: int) -> Budget | None:
        """The budget that holds for a layer, before it is spread.

        Raises:
            ValueError: a list of budgets that is not as long as the model.
        """
        if not isinstance(self.budget, tuple):
            return self.budget
        if len(self.budget) != num_layers:
            raise ValueError(f"budget: {len(self.budget)} entries for {num_layers} layers")
        return self.budget[layer]

    def prompt_slots(self, columns: int, layer: int = 0, num_layers: int = 1) -> int:
        """C, a layer's slots for what is kept of a prompt that is padded to `columns`."""
        budget, window = self.layer_budget(layer, num_layers), self.policy.protected
        if budget is None:
            return columns
        slots = budgets.slot_capacity(budget, columns, window=window)
        if self.layers == "uniform":
            return slots
        spread = budgets.pyramid_slots(
            slots, columns, window=window, layer=layer, num_layers=num_layers
        )
        return max(spread, window + 1)

    def slots(self, columns: int, layer: int = 0, num_layers: int = 1) -> int:
        """S, a layer's slots for what is kept of the prompt and what follows it."""
        prompt = self.prompt_slots(columns, layer, num_layers)
        if self.decode_budget is None:
            return prompt + self.headroom
        return max(prompt, self.decode_budget) + self.evict_every

    def flat_slots(self, heads: int, columns: int, layer: int, num_layers: int) -> int:
        """Entries of a list that heads with budgets of their own share, with room for new ones."""
        assert self.heads is not None
        prompt = self.prompt_slots(columns, layer, num_layers)
        return self.heads.capacity(prompt, heads, layer) + heads * self.headroom

    def row_slots(
        self, lengths: Int[Array, " B"], columns: int, layer: int = 0, num_layers: int = 1
    ) -> Int[Array, " B"]:
        """Slots of a layer that each row may fill."""
        budget, window = self.layer_budget(layer, num_layers), self.policy.protected
        capacity = self.prompt_slots(columns, layer, num_layers)
        if budget is None:
            return budgets.row_budget(1.0, lengths, window=window, capacity=capacity)
        if self.layers == "uniform":
            return budgets.row_budget(budget, lengths, window=window, capacity=capacity)
        mean = budgets.slot_capacity(budget, columns, window=window)
        uniform = budgets.row_budget(budget, lengths, window=window, capacity=mean)
        share = (capacity - window) / (mean - window)
        past = jnp.round(budgets.part(uniform - window, share)).astype(uniform.dtype)
        return window + jnp.clip(past, 1, capacity - window)

    def alike(self, columns: int, num_layers: int) -> tuple[int, ...]:
        """For each layer the first one whose budget and slots are the same."""
        own = self.heads.slots if isinstance(self.heads, FrozenHeads) else ((),) * num_layers
        if len(own) != num_layers:
            raise ValueError(f"heads: budgets for {len(own)} layers, expected {num_layers}")
        keys = [
            (
                self.layer_budget(layer, num_layers),
                self.prompt_slots(columns, layer, num_layers),
                own[layer],
            )
            for layer in range(num_layers)
        ]
        return tuple(map(keys.index, keys))


def check_plans(plans: Sequence[CachePlan]) -> None:
    """Refuses one plan in place of several, and what is no plan.

    Raises:
        ValueError: naming what came.
    """
    if isinstance(plans, CachePlan) or not all(isinstance(plan, CachePlan) for plan in plans):
        raise ValueError(f"plans: expected a tuple of plans, such as (plan,), got {plans!r}")
