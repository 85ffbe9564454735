"""What a saved cache was made by, model and plan, as far as either can be known."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized import QuantArray
from restkv_jax import description as described
from restkv_jax.cache import KVCache, init_cache
from restkv_jax.fingerprint import bare, weights_fingerprint
from restkv_jax.plan import CachePlan
from restkv_jax.protocols import CausalLM, LayerSpec

# More than any prompt has. From some length on, a plan's slots may not grow any more.
_MOST_COLUMNS = 2**31


def describe_model(model: CausalLM, model_id: str) -> dict[str, Any]:
    """JSON of what tells a model from another, wherever it lies.

    Args:
        model: its layers and its weights' fingerprint; and its `config`, if it has one that is a
            dataclass. The protocol asks for none, and without it two models of the same weights
            that compute something else with them cannot be told apart.
        model_id: its name.
    """
    return {
        "id": model_id,
        "weights": weights_fingerprint(model),
        "layers": described.encode(_layers(model), "model.layers", {}),
        "config": _config(model),
    }


def check_model(stored: Mapping[str, Any], model: CausalLM, model_id: str) -> None:
    """Refuses a model that is not the one described.

    Fields of `config` are compared where the description and the model both have them:
    descriptions of earlier versions have none.

    Args:
        stored: what `describe_model` gave.
        model: to be compared.
        model_id: its name.

    Raises:
        DescriptionError: naming the first difference.
    """
    described.expect("model_id", stored.get("id"), model_id)
    theirs, ours = described.decode(stored.get("layers", [])), _layers(model)
    described.expect("layers of the model", len(theirs), len(ours))
    for layer, specs in enumerate(zip(theirs, ours, strict=True)):
        saved, given = (dataclasses.asdict(_unsplit(spec)) for spec in specs)
        for name, value in saved.items():
            described.expect(f"model.layer_specs[{layer}].{name}", value, given[name])
    config = _config(model) or {}
    for name, value in (stored.get("config") or {}).items():
        if name in config:
            described.expect(f"model.config.{name}", value, config[name])
    described.expect("the model's weights", stored.get("weights"), weights_fingerprint(model))


def check_made_by(cache: KVCache, plan: CachePlan, model: CausalLM) -> None:
    """Refuses a plan or a model that cannot have made a cache.

    A cache does not tell all: which policy filled it only if it evicts while decoding, and not
    which of its slots are headroom. So any plan passes that gives a prompt of some length a cache
    of this form; under a pyramid slots are not compared, and there may be more of them where one
    whole budget is that of all layers and heads, as a bounded prefill leaves the room of a piece.

    Raises:
        ValueError: naming what differs, what the plan or model gives, and what the cache has.
    """
    layers = _layers(model)
    if len(cache.rows) != len(layers):
        raise ValueError(f"model: {len(layers)} layers, but the cache has {len(cache.rows)}")
    if cache.eviction != plan.eviction:
        raise ValueError(
            f"plan: evicts {plan.eviction} while decoding, but the cache {cache.eviction}"
        )
    if cache.by_slot != (plan.rope == "slot"):
        raise ValueError(f"plan: rope is {plan.rope!r}, but the cache has by_slot={cache.by_slot}")
    storage = {"int8" if isinstance(s.k, QuantArray) else "model" for s in cache.stacks}
    if storage != {plan.storage}:
        raise ValueError(f"plan: storage is {plan.storage!r}, but the cache's is {storage}")

    rows, dtype = cache.next_position.shape[0], model.kv_dtype
    make = functools.partial(init_cache, layers, plan, batch=rows, dtype=dtype)

    def made(columns: int) -> KVCache:
        return jax.eval_shape(functools.partial(make, prompt_columns=columns))

    largest = made(_MOST_COLUMNS)
    for layer in range(len(layers)):
        found = _form(cache, layer)
        for name, value in _form(largest, layer).items():
            if value != found[name]:
                raise ValueError(
                    f"plan, model: {name} in layer {layer}: their cache has {value}, this one "
                    f"{found[name]}"
                )
    may_be_bounded = isinstance(plan.budget, int) and plan.heads is None
    if plan.layers == "uniform" and not (may_be_bounded and _has_more(cache, largest)):
        _check_slots(cache, made)


def _check_slots(cache: KVCache, made: Callable[[int], KVCache]) -> None:
    def slots(cache: KVCache) -> list[int]:
        return [cache.slots(layer) for layer in range(len(cache.rows))]

    def total(columns: int) -> int:
        return sum(slots(made(columns)))

    # No layer gets smaller with the prompt: if any length gives these slots, then the first that
    # gives their sum.
    found = slots(cache)
    columns = bisect.bisect_left(range(_MOST_COLUMNS), sum(found), lo=1, key=total)
    nearest = slots(made(columns))
    if found != nearest:
        raise ValueError(
            f"plan: its layers have {nearest} slots, as near to the cache's {found} as the length "
            "of the prompt brings them"
        )


def _has_more(cache: KVCache, least: KVCache) -> bool:
    """Whether a cache has at least these slots, in rings as many."""
    return all(
        theirs == ours if stack.ring else theirs >= ours
        for stack, other in zip(cache.stacks, least.stacks, strict=True)
        for theirs, ours in zip(stack.sizes, other.sizes, strict=True)
    )


def _form(cache: KVCache, layer: int) -> dict[str, Any]:
    """What a layer's slots have in common whatever the prompt is."""
    stack = cache.stacks[cache.rows[layer][0]]
    keys = jax.tree.leaves(stack.k)[0]
    return {
        "sliding window": stack.ring,
        "heads with a set of their own": stack.heads,
        "lists that heads share": None if stack.owners is None else stack.owners.shape[1],
        "size of a head": keys.shape[-1],
        "dtype": jnp.dtype(keys.dtype).name,
    }


def _layers(model: CausalLM) -> tuple[LayerSpec, ...]:
    return tuple(map(_unsplit, model.layer_specs))


def _unsplit(spec: LayerSpec) -> LayerSpec:
    # Where a layer's heads lie says nothing of the model; earlier versions wrote it.
    return dataclasses.replace(spec, head_axis=None, head_shards=1)


def _config(model: CausalLM) -> dict[str, Any] | None:
    config = getattr(bare(model), "config", None)
    return described.settings(config) if dataclasses.is_dataclass(config) else None
