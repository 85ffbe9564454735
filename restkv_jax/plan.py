"""A cache's plan: which policy, how many slots, how much room for new tokens."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Int

from restkv_jax import budget as budgets
from restkv_jax.budget import Budget
from restkv_jax.policies import Policy, Streaming
from restkv_jax.protocols import LayerSpec

# The last tokens and nothing else: all that a layer with a sliding window can see.
_LAST = Streaming(sinks=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Everything static about a compressed cache; frozen and hashable.

    Policy, budget and headroom are those of the layers that see everything. A layer with a
    sliding window of w tokens holds the last w whatever they are, even if the budget is smaller:
    w is all that it ever needs, and less would change what it computes. So a model whose layers
    all slide is evicted by its windows alone.

    Attributes:
        policy: what is kept.
        budget: slots a head for the prompt, or a ratio of the prompt; None for policies that
            keep everything.
        headroom: slots for tokens that follow the prompt.
    """

    policy: Policy
    budget: Budget | None = None
    headroom: int = 128

    def __post_init__(self) -> None:
        """Refuses a budget that the policy cannot meet.

        Raises:
            ValueError: naming the budget or the headroom, and what was expected.
        """
        if self.headroom < 0:
            raise ValueError(f"headroom: expected at least 0 slots, got {self.headroom}")
        if not self.policy.needs_budget:
            if self.budget is not None:
                raise ValueError(f"budget: policy {self.policy.name!r} keeps everything")
        elif self.budget is None:
            raise ValueError(f"budget: policy {self.policy.name!r} needs one")
        else:
            budgets.check_budget(self.budget, window=self.policy.protected)

    def for_layer(self, spec: LayerSpec, columns: int) -> CachePlan:
        """This plan, or for a layer with a sliding window the plan of its ring buffer.

        A ring needs no headroom: it has a slot for each token of the window, or for each token
        that there can be if those are fewer.
        """
        if spec.window is None:
            return self
        slots = min(spec.window, columns + self.headroom)
        return CachePlan(policy=_LAST, budget=slots, headroom=0)

    def prompt_slots(self, columns: int) -> int:
        """C, slots for what is kept of a prompt that is padded to `columns`."""
        if self.budget is None:
            return columns
        return budgets.slot_capacity(self.budget, columns, window=self.policy.protected)

    def row_slots(self, lengths: Int[Array, " B"], columns: int) -> Int[Array, " B"]:
        """Slots that each row may fill."""
        budget = 1.0 if self.budget is None else self.budget
        return budgets.row_budget(
            budget, lengths, window=self.policy.protected, capacity=self.prompt_slots(columns)
        )
