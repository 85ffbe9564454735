"""How a model's heads share a budget: counts for any budget and length, and their file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from restkv_jax.allocation import FrozenHeads
from restkv_jax.plan import CachePlan
from restkv_jax.policies import Policy, VNorm
from restkv_jax.protocols import CausalLM, LayerSpec

Importance = Literal["attention", "reconstruction"]

_FORMAT = "restkv-jax head budgets 1"

# Shares below it count as none: ratios of numbers as small as that are not finite.
_LEAST_SHARE = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBudgets:
    """How a model's heads share a budget, measured by `calibration.calibrate_head_budgets`.

    Attributes:
        by: what the importance of an entry was.
        heads: key/value heads of each layer; 0 for layers with a sliding window, whose ring
            buffers no budget touches.
        forced: entries that every head keeps in any case.
        length: tokens of the texts.
        shares: mean budget in entries a head -> each head's share of the entries beyond the forced
            ones, heads of all layers one after another; each row sums to 1.
    """

    by: Importance
    heads: tuple[int, ...]
    forced: int
    length: int
    shares: dict[int, tuple[float, ...]]

    def counts(self, budget: int, *, length: int | None = None, floor: float = 0.0) -> np.ndarray:
        """Entries of every head, int [sum of `heads`]; they sum to `budget` times the heads.

        Between calibrated budgets the shares are interpolated, beyond them the nearest hold.

        Args:
            budget: entries a head on average, the forced ones included.
            length: of the prompts to come. The shares are those of the same part of the text, and
                no head gets more entries than there are tokens; the texts' length by default.
            floor: share of the entries beyond the forced ones that all heads get alike.

        Raises:
            ValueError: a budget that the forced entries fill or that exceeds the length, or a
                floor that is no share.
        """
        length = self.length if length is None else length
        if not self.forced < budget <= length:
            raise ValueError(
                f"budget: expected more than the {self.forced} entries that are kept in any case "
                f"and at most {length}, got {budget}"
            )
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor: expected a share within [0, 1], got {floor!r}")
        known = sorted(self.shares)
        table = np.asarray([self.shares[one] for one in known])
        place = np.interp(budget * self.length / length, known, np.arange(len(known)))
        low = int(place)
        high = min(low + 1, len(known) - 1)
        share = (1.0 - (place - low)) * table[low] + (place - low) * table[high]
        share = (1.0 - floor) * share + floor / share.size
        share = np.where(share < _LEAST_SHARE, 0.0, share)
        free = budget - self.forced
        return self.forced + apportion(share, free * share.size, length - self.forced)

    def frozen(
        self, budget: int, *, length: int | None = None, floor: float = 0.0, lists: int = 1
    ) -> FrozenHeads:
        """Budgets by head and layer; arguments as of `counts`, and `HeadAllocation.lists`."""
        counts = iter(self.counts(budget, length=length, floor=floor).tolist())
        # What a layer with a sliding window is given here has no effect.
        slots = [tuple(next(counts) for _ in range(k)) or (budget,) for k in self.heads]
        return FrozenHeads(slots=tuple(slots), lists=lists)

    def layers(
        self, budget: int, *, length: int | None = None, floor: float = 0.0
    ) -> tuple[int, ...]:
        """Budgets by layer alone, all heads of a layer alike, for `CachePlan(budget=...)`.

        They sum to `budget` times the layers, where those have equal numbers of heads. Arguments
        as of `counts`.
        """
        counts = self.counts(budget, length=length, floor=floor) - self.forced
        held = [k for k in self.heads if k]
        means = np.add.reduceat(counts, np.cumsum([0, *held[:-1]])) / held
        most = (length or self.length) - self.forced
        free = iter(apportion(means, (budget - self.forced) * len(held), most).tolist())
        return tuple(self.forced + next(free) if k else budget for k in self.heads)

    def plan(self, budget: int, *, policy: Policy | None = None, **options: Any) -> CachePlan:
        """The query-agnostic setting: large values in each head, with the heads' own budgets.

        Args:
            budget: entries a head on average.
            policy: another policy than `VNorm()`; it may force no more tokens than `forced`.
            options: of `CachePlan`.
        """
        policy = VNorm() if policy is None else policy
        return CachePlan(policy=policy, budget=budget, heads=self.frozen(budget), **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a small JSON file, whole or not at all."""
        content = dataclasses.asdict(self) | {"format": _FORMAT}
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: CausalLM) -> HeadBudgets:
        """Reads what `save` wrote.

        Args:
            path: the file.
            model: the model that the budgets are for; only its layers and heads are compared.

        Raises:
            ValueError: no such file of ours, or another model's.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("another format")
            shares = {int(key): tuple(map(float, row)) for key, row in content["shares"].items()}
            heads = tuple(map(int, content["heads"]))
            if not shares or any(len(row) != sum(heads) for row in shares.values()):
                raise ValueError("shares that do not fit the heads")
            found = cls(**{**content, "heads": heads, "shares": shares})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: {path} holds no head budgets: {error}") from None
        expected = attending_heads(model.layer_specs)
        if found.heads != expected:
            raise ValueError(
                f"path: {path} holds budgets for layers of {found.heads} heads, the model has "
                f"{expected}"
            )
        return found


def apportion(shares: np.ndarray, total: int, most: int) -> np.ndarray:
    """Whole numbers in proportion to shares, by largest remainders, with exactly this sum.

    Args:
        shares: at least 0, one of them positive.
        total: their sum, at most `most` times the shares.
        most: the largest number; what a share is due beyond it goes to the others.
    """
    shares = np.asarray(shares, np.float64)
    if total > most * shares.size:
        raise ValueError(f"total: expected at most {most} x {shares.size}, got {total}")
    counts, full = np.zeros(shares.shape), np.zeros(shares.shape, bool)
    while True:
        left = total - most * full.sum()
        weights = np.where(full, 0.0, shares)
        if weights.sum() == 0.0:  # the others are due nothing: they share what is left alike
            weights = (~full).astype(np.float64)
        counts = np.where(full, most, left * weights / max(weights.sum(), 1e-300))
        if not (counts > most).any():
            break
        full |= counts >= most
    whole = np.floor(counts + 1e-9)
    order = np.argsort(-np.where(whole < most, counts - whole, -1.0), kind="stable")
    whole[order[: round(total - whole.sum())]] += 1
    return whole.astype(np.int64)


def attending_heads(specs: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    """Key/value heads of each layer; 0 for layers with a sliding window."""
    return tuple(0 if spec.window is not None else spec.num_kv_heads for spec in specs)
