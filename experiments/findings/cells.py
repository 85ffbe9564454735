"""What is compared: scores, and how a budget is spread over layers and heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from restkv_jax.budget import pyramid_slots
from restkv_jax.compression import score
from restkv_jax.decode import (
    AdaKV,
    CausalLM,
    HeadBudgets,
    KeyDiff,
    Policy,
    RestKV,
    SharedBudget,
    SnapKV,
    Streaming,
    VNorm,
)
from restkv_jax.layer import LayerInputs
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.protocols import LayerSpec, Projection

_ROBUST = {"spatial": "avgpool", "sinks": 4}

POLICIES: dict[str, Policy] = {
    "streaming": Streaming(),
    "snapkv": SnapKV(),
    "snapkv_k21": SnapKV(sinks=4, recent=12, kernel=21),
    "restkv": RestKV(),
    "restkv_k21_w32": RestKV(**_ROBUST, kernel=21),  # type: ignore[arg-type]
    "restkv_k21": RestKV(**_ROBUST, recent=12, kernel=21),  # type: ignore[arg-type]
    "restkv_k31": RestKV(**_ROBUST, recent=12, kernel=31),  # type: ignore[arg-type]
    "restkv_k41": RestKV(**_ROBUST, recent=12, kernel=41),  # type: ignore[arg-type]
    "keydiff": KeyDiff(sinks=4, recent=12),
    "vnorm": VNorm(),
}
"""Label -> policy; `kN` is an average over N positions with 4 sinks and 12 recent tokens kept."""

_BASES = {"inside": "restkv_k21", "agnostic": "vnorm"}
_SPREADS = ("pyramid", "adakv", "shared", "layers", "frozen", "frozen_rec", "frozen_random")
_AGNOSTIC = ("streaming", "restkv", "restkv_k21", "keydiff", "vnorm")


def cells(mode: str) -> list[tuple[str, str]]:
    """(policy, allocation) pairs of a mode: "inside" or "agnostic"."""
    uniform = POLICIES if mode == "inside" else _AGNOSTIC
    pairs = [(name, "uniform") for name in uniform]
    pairs += [(_BASES[mode], spread) for spread in _SPREADS]
    if mode == "inside":
        return [*pairs, ("vnorm", "frozen")]
    return [*pairs, ("streaming", "frozen")]


def importances(
    model: CausalLM, tokens: Int[Array, "1 T"], *, policies: tuple[Policy, ...]
) -> tuple[Float[Array, "L K T"], ...]:
    """Each policy's scores in the layers that see everything; they hold for all budgets alike.

    Args:
        model: with its output factors, its loop over layers unrolled.
        tokens: one prompt without padding.
        policies: what scores.
    """
    specs = model.layer_specs
    found = [
        _scored(layer, spec=spec, num_layers=len(specs), policies=policies)
        for layer, spec in zip(_captured(model, tokens), specs, strict=True)
        if spec.window is None
    ]
    return tuple(jnp.concatenate(rows) for rows in zip(*found, strict=True))


class _Captured(NamedTuple):
    q: Array
    k: Array
    v: Array
    w_o: Projection


@jax.jit
def _captured(model: CausalLM, tokens: Int[Array, "1 T"]) -> tuple[_Captured, ...]:
    """What every layer hands to `attend`, heads before tokens."""
    specs = model.layer_specs

    def attend(
        layer: int | Array,
        q: Array,
        k: Array,
        v: Array,
        w_o: Array | Projection,
        found: tuple[_Captured, ...],
    ) -> tuple[Array, tuple[_Captured, ...]]:
        assert isinstance(layer, int)
        assert isinstance(w_o, Projection)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        lengths = jnp.full(1, tokens.shape[1], jnp.int32)
        out, _ = causal_attention(q, k, v, lengths, spec=specs[layer], rows=0)
        return jnp.swapaxes(out, 1, 2), (*found, _Captured(q, k, v, w_o))

    start: tuple[_Captured, ...] = ()
    return model(tokens, jnp.arange(tokens.shape[1])[None], attend, start)[1]


@functools.partial(jax.jit, static_argnames=("spec", "num_layers", "policies"))
def _scored(
    layer: _Captured, *, spec: LayerSpec, num_layers: int, policies: tuple[Policy, ...]
) -> list[Float[Array, "1 K T"]]:
    """One layer's scores; compiled once for all layers that are alike."""
    inputs = LayerInputs(
        q=layer.q,
        k=layer.k,
        v=layer.v,
        factor=layer.w_o.factor,
        lengths=jnp.full(1, layer.k.shape[2], jnp.int32),
        spec=spec,
        w_o=layer.w_o.w_o,
        num_layers=num_layers,
    )
    return [score(policy, inputs, capacity=128) for policy in policies]


def counts(
    spread: str,
    importance: Float[Array, "L K T"],
    budget: int,
    *,
    protected: int,
    calibrated: Mapping[str, HeadBudgets],
) -> np.ndarray:
    """Entries of each head [L, K] under an allocation.

    Args:
        spread: "uniform", "pyramid", "adakv", "shared", "layers", "frozen", ...
        importance: one policy's scores.
        budget: entries a head on average.
        protected: tokens that the policy always keeps.
        calibrated: "attention", "reconstruction" and "random" budgets.
    """
    layers, heads, columns = importance.shape
    if spread == "uniform":
        return np.full((layers, heads), budget)
    if spread == "pyramid":
        slots = [
            max(
                pyramid_slots(budget, columns, window=protected, layer=i, num_layers=layers),
                protected + 1,
            )
            for i in range(layers)
        ]
        return np.broadcast_to(np.asarray(slots)[:, None], (layers, heads))
    if spread in ("adakv", "shared"):
        allocation = AdaKV() if spread == "adakv" else SharedBudget()
        budgets = jnp.full(layers, budget, jnp.int32)
        return np.asarray(allocation.counts(importance, budgets, budget, 0))
    sources = {
        "frozen": "attention",
        "frozen_rec": "reconstruction",
        "frozen_random": "random",
        "layers": "reconstruction",
    }
    source = calibrated[sources[spread]]
    if spread == "layers":
        by_layer = [
            one
            for one, k in zip(source.layers(budget, length=columns), source.heads, strict=True)
            if k
        ]
        return np.broadcast_to(np.asarray(by_layer)[:, None], (layers, heads))
    return source.counts(budget, length=columns).reshape(layers, heads)


def kept(ranks: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """True for the entries that stay, bool [L, K, T].

    Args:
        ranks: of each entry within its head, 0 for the most important one.
        budgets: entries of each head [L, K].
    """
    return ranks < budgets[..., None]


def ranks_of(importance: Float[Array, "L K T"]) -> np.ndarray:
    """Rank of each entry within its head; ties go to the lower position."""
    order = np.argsort(-np.asarray(importance), axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def policies_of(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Names of the policies in the pairs, each once."""
    return tuple(dict.fromkeys(name for name, _ in pairs))
