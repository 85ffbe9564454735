"""Budgets of heads and layers found once for a model: which heads a repeated text needs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import (
    output_factor,
    per_query_reconstruction,
    window_attention,
)
from restkv_jax.allocation import FrozenHeads
from restkv_jax.plan import CachePlan
from restkv_jax.policies import Policy, VNorm
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.protocols import CausalLM, LayerSpec, Projection

Importance = Literal["attention", "reconstruction"]

# Repeating queries whose weights are alive at once, times the tokens that they see.
BLOCK = 128


# Shares below it count as none: ratios of numbers as small as that are not finite.
_LEAST_SHARE = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBudgets:
    """How a model's heads share a budget, measured by `calibrate_head_budgets`.

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
        expected = _heads(model.layer_specs)
        if found.heads != expected:
            raise ValueError(
                f"path: {path} holds budgets for layers of {found.heads} heads, the model has "
                f"{expected}"
            )
        return found


_FORMAT = "restkv-jax head budgets 1"


def calibrate_head_budgets(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    *,
    budget: int | Sequence[int],
    by: Importance = "attention",
    instruction: Sequence[int] = (),
    sinks: int = 4,
    recent: int = 12,
) -> HeadBudgets:
    """Finds which heads need many entries, by letting the model repeat texts.

    The model reads a text, an instruction and the text again. An entry of a key/value head is as
    important as the repetition finds it at most (KVzip, Kim et al., arXiv 2505.23416): by the
    attention that a repeating query pays to it, or by what that query's output would lose with it
    (Eq. 7 of ReST-KV, in units of the layer's output). One global ranking over layers and heads
    then spends the budget, and how much of it each head gets, averaged over the texts, is what is
    kept: it belongs to the model more than to the texts, of which one or two do, or random tokens.

    Costs a prefill of twice the length for each text; never holds T x T.

    Args:
        model: see `CausalLM`; its loop over layers must be unrolled.
        tokens: texts of one length, without padding, or random token ids. Of a model with sliding
            windows better twice as long as a window: what a window still holds of the text is read
            there, and not in the layers that are measured.
        budget: entries a head on average, for which shares are measured; one or several.
        by: "attention" or "reconstruction".
        instruction: tokens between a text and its repetition.
        sinks: first tokens that every head keeps; they take no part in the ranking.
        recent: last tokens, likewise.

    Raises:
        ValueError: naming the argument.
    """
    budgets = [budget] if isinstance(budget, int) else sorted(set(budget))
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens: expected [B, T], got {tokens.shape}")
    length, forced = tokens.shape[1], sinks + recent
    if min(sinks, recent) < 0 or forced >= length:
        raise ValueError(f"sinks, recent: expected fewer than {length}, got {sinks} and {recent}")
    window = max((spec.window or 0 for spec in model.layer_specs), default=0)
    if length <= window:
        raise ValueError(
            f"tokens: expected more than {window}, the sliding window of other layers, which would "
            f"repeat the text by themselves; got {length}"
        )
    if by not in get_args(Importance):
        raise ValueError(f"by: expected attention or reconstruction, got {by!r}")
    if not budgets or not forced < budgets[0] <= budgets[-1] <= length:
        raise ValueError(f"budget: expected more than {forced} and at most {length}, got {budget}")
    heads = _heads(model.layer_specs)
    if not any(heads):
        raise ValueError("model: all layers have a sliding window, so that no budget is spent")
    between = jnp.asarray(instruction, jnp.int32).reshape(1, -1)
    total = {one: np.zeros(sum(heads)) for one in budgets}
    for text in tokens:
        found = repetition_importance(model, text[None], between, by=by)
        free = np.concatenate([np.asarray(x)[0, :, sinks : length - recent] for x in found])
        for one in budgets:
            total[one] += global_counts(free, (one - forced) * len(free))
    shares = {one: tuple((count / count.sum()).tolist()) for one, count in total.items()}
    return HeadBudgets(by=by, heads=heads, forced=forced, length=length, shares=shares)


@functools.partial(jax.jit, static_argnames=("by",))
def repetition_importance(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    instruction: Int[Array, "1 I"],
    *,
    by: Importance = "attention",
) -> tuple[Float[Array, "B K T"], ...]:
    """What a text's entries are to its repetition, for each layer that sees everything.

    The maximum over the queries of the instruction and the repetition, and over the query heads of
    a group.

    Args:
        model: see `CausalLM`.
        tokens: texts, without padding.
        instruction: what comes between a text and its repetition, possibly nothing.
        by: see `calibrate_head_budgets`.

    Raises:
        ValueError: the model scans over its layers.
    """
    batch, length = tokens.shape
    between = jnp.broadcast_to(instruction, (batch, instruction.shape[1]))
    joint = jnp.concatenate([tokens, between, tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(joint.shape[1]), joint.shape)
    specs = model.layer_specs

    def attend(
        layer: int | Array,
        q: Array,
        k: Array,
        v: Array,
        w_o: Array | Projection,
        found: tuple[Array, ...],
    ) -> tuple[Array, tuple[Array, ...]]:
        if not isinstance(layer, int):
            raise ValueError("model: expected an unrolled loop over layers, got a scan")
        out, importance = _layer_importance(q, k, v, w_o, spec=specs[layer], length=length, by=by)
        return out, found if specs[layer].window is not None else (*found, importance)

    start: tuple[Array, ...] = ()
    return model(joint, positions, attend, start)[1]


@functools.partial(jax.jit, static_argnames=("spec", "length", "by"))
def _layer_importance(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    w_o: Float[Array, "N H D"] | Projection,
    *,
    spec: LayerSpec,
    length: int,
    by: Importance,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B K T"]]:
    """One layer's attention over text and repetition, and the importance of the text's entries."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    batch, heads, columns, _ = q.shape
    lengths = jnp.full(batch, columns, jnp.int32)
    out, _ = causal_attention(q, k, v, lengths, spec=spec, rows=0)
    out = jnp.swapaxes(out, 1, 2)
    if spec.window is not None:
        return out, jnp.zeros((batch, spec.num_kv_heads, length))
    factor = w_o.factor if isinstance(w_o, Projection) else output_factor(w_o)
    repeating = columns - length
    blocks = -(-repeating // BLOCK)
    # Whole blocks; the queries behind the end see the same keys and are left out.
    surplus = ((0, 0), (0, 0), (0, blocks * BLOCK - repeating), (0, 0))
    rows = jnp.moveaxis(
        jnp.pad(q[:, :, length:], surplus).reshape(batch, heads, blocks, BLOCK, -1), 2, 0
    )

    def step(most: Array, args: tuple[Array, Array]) -> tuple[Array, None]:
        block, queries = args
        row = block * BLOCK + jnp.arange(BLOCK)
        distance = (length + row)[:, None] - jnp.arange(columns)
        seen = (distance >= 0) & (row < repeating)[:, None]
        weights = window_attention(
            queries, k, seen[None, None], scale=spec.scale, softcap=spec.softcap
        )
        if by == "attention":
            found = jnp.max(weights[..., :length], axis=2)
        else:
            found = per_query_reconstruction(weights, v, factor, None, past=length)
        return jnp.maximum(most, found), None

    start = jnp.zeros((batch, heads, length), jnp.float32)
    most, _ = jax.lax.scan(step, start, (jnp.arange(blocks), rows))
    return out, jnp.max(most.reshape(batch, spec.num_kv_heads, -1, length), axis=2)


def global_counts(importance: np.ndarray, entries: int) -> np.ndarray:
    """How many of the largest entries of all heads each head holds.

    Args:
        importance: [R, P], heads of all layers.
        entries: how many are counted; ties go to the lower head, then to the lower position.
    """
    best = np.argsort(-importance, axis=None, kind="stable")[:entries]
    return np.bincount(best // importance.shape[1], minlength=importance.shape[0])


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


def _heads(specs: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    return tuple(0 if spec.window is not None else spec.num_kv_heads for spec in specs)
