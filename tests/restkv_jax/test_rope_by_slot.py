"""Rotary positions by slot: the cache is that of a shorter text, made of what was kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CachePlan,
    FrozenHeads,
    LaCache,
    SnapKV,
    Streaming,
    decode_step,
    extend,
    init_cache,
    pad_prompts,
    prefill,
    prefill_chunked,
)
from restkv_jax.rerotation import rerotate
from tests.restkv_jax import dense, tiny

PROMPT = 40


@pytest.fixture(scope="module")
def model():
    # In a single layer keys and values depend on tokens and positions alone.
    return tiny.make(layers=1)


def prompts(*lengths):
    return [np.random.default_rng(n).integers(0, 61, n).tolist() for n in lengths]


def test_keys_turn_to_where_they_would_be():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    at = jnp.asarray([[0, 3, 9, 40, 7], [1, 2, 3, 4, 5]])
    to = jnp.asarray([[5, 1, 9, 2, 30], [0, 0, 9, 9, 1]])
    shift = jnp.broadcast_to((to - at)[..., None], (2, 5, 3))
    turned = rerotate(tiny.rotate(x, at), shift, tiny.rotary(8))
    np.testing.assert_allclose(turned, tiny.rotate(x, to), atol=2e-5)


@pytest.mark.parametrize(("decode_budget", "slots"), [(None, 12 + 128), (10, 12 + 6)])
@pytest.mark.parametrize("prefill", [prefill, "chunked"], ids=["exact", "chunked"])
def test_logits_are_those_of_the_kept_text(model, decode_budget, slots, prefill):
    if prefill == "chunked":
        prefill = lambda *args, plans: prefill_chunked(*args, plans=plans, piece=9)  # noqa: E731
    rows = prompts(PROMPT, 25)
    plan = CachePlan(
        policy=Streaming(), budget=12, rope="slot", decode_budget=decode_budget, evict_every=6
    )
    _, (cache,) = prefill(model, *pad_prompts(rows), plans=(plan,))
    step, texts = jax.jit(decode_step), [list(row) for row in rows]
    for token in prompts(20)[0]:
        before = cache
        logits, cache = step(model, cache, jnp.asarray([token] * 2), jnp.asarray([True] * 2))
        assert cache.slots(0) == slots
        for row, text in enumerate(texts):
            text.append(token)
            kept = np.asarray(cache.kept_positions(0))[row, 0]
            short = [text[p] for p in kept[kept >= 0]]
            expected = dense.logits_of(model, short)[-1]
            np.testing.assert_allclose(logits[row], expected, atol=3e-5)
    several, _ = extend(model, before, jnp.asarray([[token]] * 2))
    np.testing.assert_allclose(several[:, 0], logits, atol=3e-5)


def test_lacache_counts_the_same_slots_in_all_layers():
    model = tiny.make(layers=4)
    plan = CachePlan(policy=LaCache(sinks=1, span=2), budget=16, rope="slot", headroom=8)
    rows = prompts(PROMPT, 33)
    _, (cache,) = prefill(model, *pad_prompts(rows), plans=(plan,))
    (stack,) = cache.stacks
    assert (np.asarray(stack.used) == np.asarray(stack.used)[0]).all()
    true = dataclasses.replace(plan, rope="true")
    _, (other,) = prefill(model, *pad_prompts(rows), plans=(true,))
    for layer in range(4):
        kept = np.asarray(cache.kept_positions(layer))
        np.testing.assert_array_equal(kept, other.kept_positions(layer))
        ours, theirs = stack.layer(layer), other.stacks[0].layer(layer)
        shift = jnp.arange(kept.shape[-1]) - kept
        turned = np.asarray(rerotate(theirs.k, shift, tiny.rotary(8)))
        np.testing.assert_allclose(ours.k[kept >= 0], turned[kept >= 0], atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": SnapKV()},
        {"policy": Streaming(), "heads": FrozenHeads(slots=((64, 64),))},
        {"policy": Streaming(), "layers": "pyramid"},
        {"policy": Streaming(), "storage": "int8"},
        {"policy": Streaming(), "rope": "cache"},
    ],
    ids=str,
)
def test_plans_that_cannot_count_by_slot_are_refused(options):
    with pytest.raises(ValueError, match="rope"):
        CachePlan(**{"budget": 64, "rope": "slot", **options})


@pytest.mark.parametrize(
    "change", [{"num_heads": 2}, {"num_kv_heads": 4}, {"head_dim": 4}], ids=str
)
def test_layers_of_unequal_heads_are_refused(model, change):
    plan = CachePlan(policy=Streaming(), budget=12, rope="slot")
    first = model.layer_specs[0]
    specs = (first, dataclasses.replace(first, **change))
    with pytest.raises(
        ValueError, match=r"^rope: .* equal numbers and sizes of heads, .* layer 1$"
    ):
        init_cache(specs, plan, batch=1, prompt_columns=64, dtype=jnp.float32)


def test_layers_without_frequencies_or_with_a_window_are_refused(model):
    plan = CachePlan(policy=Streaming(), budget=12, rope="slot")
    for change in ({"rotary": None}, {"window": 8}):
        spec = dataclasses.replace(model.layer_specs[0], **change)
        other = dataclasses.replace(model, layer_specs=(spec,))
        with pytest.raises(ValueError, match="layer 0"):
            jax.eval_shape(lambda other=other: prefill(other, *pad_prompts([[1]]), plans=(plan,)))
