"""How far a model that reads an evicted cache is from itself with the full one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from restkv_jax.cache import KVCache
from restkv_jax.factors import FactoredLM
from restkv_jax.feed import feed
from restkv_jax.leave_one_out import leave_one_out, oracle_overlap
from restkv_jax.plan import CachePlan, check_plans
from restkv_jax.policies import Full
from restkv_jax.policies.base import Granularity
from restkv_jax.prefill import prefill
from restkv_jax.protocols import CausalLM, LayerSpec
from restkv_jax.recording import Call, Recorder, Replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fidelity:
    """One plan against the full cache, on the host; NaN where there is nothing to measure.

    Errors are relative, ‖full - evicted‖ / ‖full‖, Euclidean over all tokens of a row's
    continuation together; 0 is exact, and sqrt(2) about that of an unrelated vector of the same
    length. J is K or N by the policy's granularity.

    Attributes:
        attention_heads: [B, L, N] error of each head's o W_O, when the layer is given the same
            queries and new keys and values as with the full cache: what its own eviction costs.
            NaN for plans that number positions by slot, which such queries do not suit.
        attention: [B, L] of their sum over the heads, the layer's output.
        residual: [B, L] error of the residual stream after each layer, with all that the layers
            before it add to; None if the model is no `StagedLM`.
        hidden: [B] error of the hidden state after the final norm.
        kl: [B, C] KL(full || evicted) in nats of the distributions that follow each token of the
            continuation.
        top1: [B, C] 1 where both have the same most likely token, else 0.
        overlap: [B, L, J] share of a set's kept past tokens that are also in the oracle's set of
            the same size, see `measure_fidelity`; NaN where no past token is kept, in layers
            with a sliding window, and if it was not asked for.
    """

    attention_heads: np.ndarray
    attention: np.ndarray
    residual: np.ndarray | None
    hidden: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    overlap: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means over everything but NaN, by the names of the attributes; KL at its worst too.

        `residual` is that of the last layer.
        """
        means = {
            "attention": _mean(self.attention),
            "residual": np.nan if self.residual is None else _mean(self.residual[:, -1]),
            "hidden": _mean(self.hidden),
            "kl": _mean(self.kl),
            "largest_kl": np.max(self.kl, where=~np.isnan(self.kl), initial=0.0),
            "top1": _mean(self.top1),
            "overlap": _mean(self.overlap),
        }
        return {name: float(value) for name, value in means.items()}

    def to_lists(self) -> dict[str, Any]:
        """All values as nested lists of plain numbers, for JSON; NaN as None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nothing = np.asarray(None, object)
        return {
            name: None if x is None else np.where(np.isnan(x), nothing, x).tolist()
            for name, x in fields.items()
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> Fidelity:
        """What `to_lists` was made of, exactly."""
        fields: dict[str, Any] = {
            name: None if x is None else np.asarray(x, np.float32) for name, x in lists.items()
        }
        return cls(**fields)

    @classmethod
    def concatenate(cls, parts: Sequence[Fidelity]) -> Fidelity:
        """The rows of several measurements of one plan, of continuations equally long."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            fields[field.name] = None if values[0] is None else np.concatenate(values)
        return cls(**fields)


def measure_fidelity(
    model: CausalLM,
    tokens: Int[Array, "B T"] | np.ndarray,
    valid: Bool[Array, "B T"] | np.ndarray,
    continuation: Int[Array, "B C"] | np.ndarray,
    continuation_valid: Bool[Array, "B C"] | np.ndarray | None = None,
    *,
    plans: Sequence[CachePlan],
    oracle_window: int | None = 32,
) -> tuple[Fidelity, ...]:
    """Feeds a given continuation to the full cache and to those of the plans, from one prefill.

    The oracle's set is that of `leave_one_out`: of a row's tokens before the last
    `oracle_window`, as many as the policy keeps of them, those whose removal alone changes the
    layer's output most for these last queries. The last tokens are left out of both sets:
    policies keep them whatever they are worth.

    Args:
        model: see `CausalLM`; its loop over layers is unrolled. A `StagedLM` shows more.
        tokens: prompts, padded on either side.
        valid: True for tokens, one contiguous run of at least one in each row.
        continuation: what follows, teacher-forced and at once.
        continuation_valid: False for padding; every token counts by default.
        plans: caches with room for the continuation.
        oracle_window: W; None leaves the overlap out. It costs O(T) softmaxes for each of the W
            queries.

    Returns:
        One result for each plan.

    Raises:
        ValueError: no continuation, plans that are none, one without room for it, or a model that
            scans.
    """
    check_plans(plans)
    tokens, valid, continuation = (jnp.asarray(x) for x in (tokens, valid, continuation))
    count = continuation.shape[1]
    if count < 1:
        raise ValueError("continuation: expected at least 1 token, got none")
    if oracle_window is not None and oracle_window < 1:
        raise ValueError(f"oracle_window: expected at least 1 query, got {oracle_window}")
    for index, plan in enumerate(plans):
        room = plan.headroom if plan.eviction is None else plan.evict_every
        if room < count and any(spec.window is None for spec in model.layer_specs):
            raise ValueError(
                f"plans: plan {index} has room for {room} tokens, the continuation {count}"
            )
    follows = jnp.ones(continuation.shape, bool)
    if continuation_valid is not None:
        follows = jnp.asarray(continuation_valid)
    full_plan = CachePlan(policy=Full(), headroom=count)
    distinct = tuple(dict.fromkeys((full_plan, *plans)))  # the full cache is often among them
    _, made = prefill(model, tokens, valid, plans=distinct)
    caches = dict(zip(distinct, made, strict=True))
    bare = model.model if isinstance(model, FactoredLM) else model
    reference = _reference(bare, caches[full_plan], continuation, follows)
    changes: dict[Granularity, tuple[np.ndarray, ...]] = {}
    results = []
    for plan in plans:
        cache = caches[plan]
        measured = jax.device_get(_compare(bare, reference, cache, continuation, follows))
        overlap = np.full((tokens.shape[0], len(model.layer_specs), 1), np.nan)
        if oracle_window is not None:
            by = _granularity(plan, model.layer_specs)
            if by not in changes:
                found = leave_one_out(bare, tokens, valid, window=oracle_window, granularity=by)
                changes[by] = jax.device_get(found)
            shares = oracle_overlap(cache, model.layer_specs, changes[by], oracle_window)
            overlap = _stacked(shares)
        results.append(
            Fidelity(
                attention_heads=_stacked(measured["heads"]),
                attention=np.stack(measured["attention"], axis=1),
                residual=np.stack(measured["residual"], axis=1) if measured["residual"] else None,
                hidden=measured["hidden"],
                kl=measured["kl"],
                top1=measured["top1"],
                overlap=overlap,
            )
        )
    return tuple(results)


def kl_divergence(
    reference: Float[Array, "*B V"], other: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """KL(softmax(reference) || softmax(other)) in nats."""
    p, q = jax.nn.log_softmax(reference, axis=-1), jax.nn.log_softmax(other, axis=-1)
    return jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)  # below 0 only by rounding


def same_top1(reference: Float[Array, "*B V"], other: Float[Array, "*B V"]) -> Bool[Array, "*B"]:
    """True where both have the same most likely token."""
    return jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)


class _Run(NamedTuple):
    """What a recorded run leaves: what `attend` was given and gave, and the hidden states."""

    calls: tuple[Call, ...]
    outputs: tuple[Array, ...]
    stages: tuple[Array, ...]
    logits: Array


@jax.jit
def _reference(
    model: CausalLM, cache: KVCache, tokens: Int[Array, "B C"], valid: Bool[Array, "B C"]
) -> _Run:
    recorder = Recorder(model)
    hidden, _ = feed(recorder, cache, tokens, valid)
    logits = model.unembed(hidden).astype(jnp.float32)
    return _Run(tuple(recorder.calls), tuple(recorder.outputs), tuple(recorder.stages), logits)


@jax.jit
def _compare(
    model: CausalLM,
    full: _Run,
    cache: KVCache,
    tokens: Int[Array, "B C"],
    valid: Bool[Array, "B C"],
) -> dict[str, Any]:
    recorder = Recorder(model)
    hidden, _ = feed(recorder, cache, tokens, valid)
    logits = model.unembed(hidden).astype(jnp.float32)
    replay = Replay(model.layer_specs, full.calls, recorder.projections)
    feed(replay, cache, tokens, valid)
    heads, attention = [], []
    suits = jnp.nan if cache.by_slot else 1.0
    for before, after, w_o in zip(full.outputs, replay.outputs, recorder.projections, strict=True):
        ours, theirs = (_projected(out, w_o) for out in (before, after))  # [B, C, N, D]
        heads.append(_relative_error(ours, theirs, valid, keep=2) * suits)
        ours, theirs = jnp.sum(ours, axis=2), jnp.sum(theirs, axis=2)
        attention.append(_relative_error(ours, theirs, valid) * suits)
    errors = [
        _relative_error(before, after, valid)
        for before, after in zip(full.stages, recorder.stages, strict=True)
    ]
    return {
        "heads": heads,
        "attention": attention,
        "residual": errors[:-1],
        "hidden": errors[-1],
        "kl": jnp.where(valid, kl_divergence(full.logits, logits), jnp.nan),
        "top1": jnp.where(valid, same_top1(full.logits, logits), jnp.nan),
    }


def _projected(out: Float[Array, "B C N H"], w_o: Float[Array, "N H D"]) -> Array:
    out, w_o = out.astype(jnp.float32), w_o.astype(jnp.float32)
    return jnp.einsum("bcnh,nhd->bcnd", out, w_o, precision="highest")


def _relative_error(
    full: Array, evicted: Array, valid: Bool[Array, "B C"], *, keep: int | None = None
) -> Array:
    """[B], or [B, N] with `keep` the axis of heads; rows without tokens are NaN."""
    axes = tuple(axis for axis in range(1, full.ndim) if axis != keep)
    counted = valid.reshape(*valid.shape, *(1,) * (full.ndim - 2))

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.where(counted, jnp.square(x), 0.0), axis=axes))

    full, evicted = full.astype(jnp.float32), evicted.astype(jnp.float32)
    error, size = norm(full - evicted), norm(full)
    relative = jnp.where(error == 0.0, 0.0, error / jnp.where(size == 0.0, 1.0, size))
    rows = jnp.any(valid, axis=1).reshape(-1, *(1,) * (relative.ndim - 1))
    return jnp.where(rows, relative, jnp.nan)


def _granularity(plan: CachePlan, specs: tuple[LayerSpec, ...]) -> Granularity:
    heads = specs[0].num_heads, specs[0].num_kv_heads
    return "kv_head" if plan.policy.cache_heads(*heads) == heads[1] else "query_head"


def _stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """[B, L, N] of arrays [B, N], NaN where a layer has fewer heads than another."""
    width = max(layer.shape[1] for layer in layers)
    padded = [
        np.pad(layer, ((0, 0), (0, width - layer.shape[1])), constant_values=np.nan)
        for layer in layers
    ]
    return np.stack(padded, axis=1)


def _mean(x: np.ndarray) -> float:
    counted = x[~np.isnan(x)]
    return float(counted.mean()) if counted.size else float("nan")
