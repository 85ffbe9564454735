"""A saved cache is not tied to the devices that it was made on."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    AdaKV,
    CacheFolderError,
    CachePlan,
    MeshRules,
    RestKV,
    Sampling,
    SnapKV,
    decode_chunk,
    init_decode,
    prefill,
    restore_cache,
    row_keys,
    save_cache,
    shard,
)
from tests.restkv_jax.eight_devices import ATOL, TOKENS, VALID, assert_placed, network, on

NO_STOP, SAMPLING = jnp.asarray([-1]), Sampling(temperature=0.8, top_k=20)
MESHES = [None, (2, 4), (4, 2)]
PLANS = {
    "restkv": CachePlan(policy=RestKV(window=4), budget=12, headroom=9),
    "lists": CachePlan(policy=SnapKV(window=4), budget=12, heads=AdaKV(lists=4), headroom=9),
}


def on_decode(model, state):
    """Sampled tokens and their log-probabilities; consumes the state."""
    return decode_chunk(model, state, NO_STOP, steps=8, sampling=SAMPLING)[1:]


@functools.cache
def caches(mesh):
    """The prompts' logits and a cache for each plan."""
    return prefill(on(mesh, network()), TOKENS, VALID, plans=tuple(PLANS.values()))


def started(mesh, plan):
    """The beginning of a generation."""
    logits, found = caches(mesh)
    cache, rows = jax.tree.map(jnp.copy, found[list(PLANS).index(plan)]), len(TOKENS)
    limit = jnp.full(rows, 9)
    return init_decode(logits, cache, row_keys(5, rows), limit, NO_STOP, sampling=SAMPLING)


@functools.cache
def expected(plan):
    """What one device gives that never stops."""
    return on_decode(network(), started(None, plan))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", MESHES[:2], ids=str)
def test_a_generation_goes_on_on_any_other_mesh(source, plan, tmp_path):
    model, state = on(source, network()), started(source, plan)
    save_cache(tmp_path / "saved", state, plan=PLANS[plan], model=model, model_id="tiny")
    for target in MESHES:
        model = on(target, network())
        sharding = None if target is None else model.rules.shardings
        given = {"model": model, "model_id": "tiny", "sharding": sharding}
        found = restore_cache(tmp_path / "saved", **given).state
        if target is not None:
            assert_placed(found.cache, model.rules)
        for ours, theirs in zip(*map(jax.tree.leaves, (found.cache, state.cache)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        tokens, logprobs = on_decode(model, found)
        np.testing.assert_array_equal(tokens, expected(plan)[0], err_msg=f"onto {target}")
        np.testing.assert_allclose(logprobs, expected(plan)[1], atol=ATOL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Caches of two rows, as `AdaKV` in two lists, in folders by name."""
    folder, model = tmp_path_factory.mktemp("caches"), network()
    base = {"policy": SnapKV(window=4), "budget": 12, "headroom": 8}
    plans = CachePlan(**base), CachePlan(**base, heads=AdaKV(lists=2))
    _, made = prefill(model, TOKENS[:2], VALID[:2], plans=plans)
    for name, cache, plan in zip(("plain", "lists"), made, plans, strict=True):
        save_cache(folder / name, cache, plan=plan, model=model, model_id="tiny")
    return folder


@pytest.mark.parametrize(
    ("name", "mesh", "message"),
    [
        ("lists", (1, 4), r"mesh: 2 lists of entries .* over 4 devices of axis 'model'"),
        ("lists", (4, 2), r"batch: 2 rows cannot be split over 4 devices of axis 'data'"),
        ("plain", (8, 1), r"batch: 2 rows cannot be split over 8 devices of axis 'data'"),
    ],
)
def test_a_mesh_that_cannot_hold_a_cache_is_refused(saved, name, mesh, message):
    model, rules = network(), MeshRules.over(data=mesh[0], model=mesh[1])
    for given in ({"model": shard(model, rules)}, {"model": model, "sharding": rules.shardings}):
        with pytest.raises(ValueError, match=message):
            restore_cache(saved / name, model_id="tiny", **given)


def test_fewer_heads_than_devices_and_arrays_that_do_not_split_are_refused(saved):
    model, rules = network(), MeshRules.over(model=8)
    with pytest.raises(
        ValueError, match=r"mesh: 4 heads with slots of their own .* over 8 devices"
    ):
        restore_cache(saved / "plain", model=model, model_id="tiny", sharding=rules.shardings)
    whole, split = rules.sharding(), rules.sharding(None, "kv_heads")
    with pytest.raises(ValueError, match=r"sharding: state.stacks.0.k of shape \(2, 4, 40, 8\): "):
        restore_cache(
            saved / "plain",
            model=model,
            model_id="tiny",
            sharding=lambda state: jax.tree.map(lambda x: split if x.ndim == 4 else whole, state),
        )


def test_where_heads_lay_is_neither_written_nor_read(saved, tmp_path):
    """Earlier versions wrote it; it says nothing of the model."""
    rules, plan = MeshRules.over(data=2, model=2), CachePlan(policy=SnapKV(window=4), budget=12)
    model = shard(network(), rules)
    _, (cache,) = prefill(model, TOKENS[:2], VALID[:2], plans=(plan,))
    save_cache(tmp_path / "saved", cache, plan=plan, model=model, model_id="tiny")
    path = tmp_path / "saved" / "cache" / "metadata"
    description = json.loads(path.read_text())
    for layer in description["model"]["layers"]:
        assert (layer["head_axis"], layer["head_shards"]) == (None, 1)
        layer.update(head_axis="model", head_shards=2)
    path.write_text(json.dumps(description))
    for other in (network(), shard(network(), MeshRules.over(model=4))):
        restore_cache(tmp_path / "saved", model=other, model_id="tiny")
    with pytest.raises(CacheFolderError, match=r"layer_specs\[0\].softcap: the cache has None, go"):
        restore_cache(tmp_path / "saved", model=network(softcap=9.0), model_id="tiny")
