"""A saved cache goes on as if it had never stopped, and fits nothing but its model."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax import decode
from restkv_jax.checkpoint import VERSION
from restkv_jax.decode import (
    H2O,
    AdaKV,
    CacheFolderError,
    CachePlan,
    CriticalKV,
    FrozenHeads,
    KVCache,
    RestKV,
    Sampling,
    SnapKV,
    decode_chunk,
    extend,
    init_decode,
    pad_prompts,
    prefill,
    restore_cache,
    row_keys,
    save_cache,
    with_output_factors,
)
from tests.restkv_jax import tiny

W = 4
NO_STOP = jnp.asarray([-1])
SAMPLING = Sampling(temperature=0.8, top_k=20)
PLANS = {
    "restkv": CachePlan(policy=RestKV.paper(window=W, alpha=0.3), budget=0.4, headroom=32),
    "carried": CachePlan(policy=H2O(window=W), budget=12, decode_budget=12, evict_every=5),
    "owners, int8": CachePlan(
        policy=SnapKV(window=W), budget=12, heads=AdaKV(floor=0.1), headroom=32, storage="int8"
    ),
    "frozen, query heads": CachePlan(
        policy=CriticalKV(window=W, granularity="query_head"),
        budget=12,
        heads=FrozenHeads(slots=((10, 14, 9, 9), (16, 8, 12, 12))),
        headroom=32,
    ),
}
RINGS = CachePlan(policy=SnapKV(window=W), budget=12, decode_budget=12, evict_every=5)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def start(model, plan):
    """Eleven tokens into a generation that samples; the rows' lengths differ."""
    r = np.random.default_rng(3)
    tokens, valid = pad_prompts([r.integers(0, 61, n).tolist() for n in (40, 23)])
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    limit = jnp.asarray([24, 9])
    state = init_decode(logits, cache, row_keys(5, 2), limit, NO_STOP, sampling=SAMPLING)
    return decode_chunk(model, state, NO_STOP, steps=10, sampling=SAMPLING)[0]


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def goes_on_alike(model, ours, theirs):
    """The same tokens, log-probabilities and caches, bit by bit; consumes both."""
    ours, theirs = (
        decode_chunk(model, state, NO_STOP, steps=10, sampling=SAMPLING) for state in (ours, theirs)
    )
    same(ours, theirs)
    assert int(ours[0].produced[0]) > 20


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_generation_goes_on_bit_by_bit(model, plan, tmp_path):
    state = start(model, plan)
    save_cache(tmp_path / "saved", state, plan=plan, model=model, model_id="tiny")
    restored = restore_cache(tmp_path / "saved", model=model, model_id="tiny")
    assert restored.plan == plan
    assert hash(restored.plan) == hash(plan)
    assert restored.model_id == "tiny"
    same(restored.state, state)
    programs = decode_chunk._cache_size()
    goes_on_alike(model, restored.state, state)
    assert decode_chunk._cache_size() == programs  # the restored state compiles nothing anew


def test_rings_go_on_bit_by_bit(tmp_path):
    model = tiny.with_windows(tiny.make(layers=3), (7, None, 7))
    state = start(model, RINGS)
    save_cache(tmp_path / "saved", state, plan=RINGS, model=model, model_id="tiny")
    restored = restore_cache(tmp_path / "saved", model=model, model_id="tiny")
    assert [stack.ring for stack in restored.state.cache.stacks] == [True, False]
    goes_on_alike(model, restored.state, state)


def test_a_bare_cache_answers_questions_bit_by_bit(tmp_path):
    """Weights in bfloat16, a model with its factors beside it, and a policy added by the caller."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(SnapKV):
        name = "mine"
        strength: float = 0.1

    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.make())
    plan = CachePlan(policy=Mine(window=W, strength=1 / 3), budget=12, headroom=8)
    _, (cache,) = prefill(model, *pad_prompts([list(range(30))]), plans=(plan,))
    with pytest.raises(ValueError, match=r"plan.policy: .*POLICIES.* got Mine"):
        save_cache(tmp_path / "saved", cache, plan=plan, model=model, model_id="tiny")
    decode.POLICIES["mine"] = Mine
    try:
        save_cache(tmp_path / "saved", cache, plan=plan, model=model, model_id="tiny")
        found = restore_cache(tmp_path / "saved", model=with_output_factors(model), model_id="tiny")
    finally:
        del decode.POLICIES["mine"]
    assert isinstance(found.state, KVCache)
    assert found.plan == plan
    tokens = jnp.asarray([[3, 1, 4]])
    same(extend(model, found.state, tokens), extend(model, cache, tokens))
    with pytest.raises(CacheFolderError, match=r"Mine.* is unknown"):
        restore_cache(tmp_path / "saved", model=model, model_id="tiny")


def test_a_sharding_says_where_arrays_go(model, tmp_path):
    plan = PLANS["restkv"]
    state = start(model, plan)
    save_cache(tmp_path / "saved", state, plan=plan, model=model, model_id="tiny")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def sharding(state):
        rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        return jax.tree.map(lambda x: rows if x.shape[0] == 2 and x.ndim > 2 else whole, state)

    found = restore_cache(tmp_path / "saved", model=model, model_id="tiny", sharding=sharding).state
    assert found.cache.stacks[0].k.sharding.spec == jax.P("data")
    assert found.keys.sharding.is_fully_replicated
    assert len(found.token.devices()) == 2
    same(found, state)
    with pytest.raises(ValueError, match="sharding: 1 shardings for 11 arrays"):
        restore_cache(
            tmp_path / "saved",
            model=model,
            model_id="tiny",
            sharding=lambda state: jax.sharding.NamedSharding(mesh, jax.P()),
        )


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "saved"
    plan = PLANS["restkv"]
    save_cache(folder, start(model, plan), plan=plan, model=model, model_id="tiny")
    return folder


def edit(folder, change):
    path = folder / "cache" / "metadata"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_the_description_can_be_read_by_people(saved):
    found = json.loads((saved / "cache" / "metadata").read_text())
    assert found["model"]["id"] == "tiny"
    assert found["plan"]["policy"]["class"] == "RestKV"
    assert found["plan"]["policy"]["alpha"] == 0.3
    assert found["plan"]["budget"] == 0.4
    assert found["state"]["cache"]["stacks"][0]["positions"]["dtype"] == "int32"


def set_version(description):
    description["version"] = VERSION + 1


def drop_plan(description):
    del description["plan"]


def unknown_option(description):
    description["plan"]["policy"]["gamma"] = 2


def impossible_option(description):
    description["plan"]["policy"]["window"] = 0


def other_bits(description):
    description["state"]["token"]["checksum"] ^= 1


def other_shape(description):
    description["state"]["cache"]["stacks"][0]["positions"]["shape"][-1] -= 1


def other_format(description):
    description["format"] = "something else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_version, rf"version .* at most {VERSION}, got {VERSION + 1}; .* newer"),
        (drop_plan, "no 'plan'"),
        (unknown_option, "'RestKV': .*gamma"),
        (impossible_option, "'RestKV': window"),
        (other_bits, r"checksum of state.token: the cache has \d+, got \d+"),
        (other_shape, r"shape of state.cache.stacks.0.positions: the cache has"),
        (other_format, "format: expected 'restkv-jax cache', got 'something else'"),
    ],
)
def test_a_damaged_description_is_refused(model, saved, tmp_path, change, message):
    shutil.copytree(saved, tmp_path / "copy")
    edit(tmp_path / "copy", change)
    with pytest.raises(CacheFolderError, match=message):
        restore_cache(tmp_path / "copy", model=model, model_id="tiny")


@pytest.mark.parametrize("lost", ["cache/metadata", "arrays", "cache", "."])
def test_an_incomplete_folder_is_refused(model, saved, tmp_path, lost):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    gone = folder / lost
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)
    with pytest.raises(CacheFolderError, match=str(folder)):
        restore_cache(folder, model=model, model_id="tiny")


def test_nothing_is_overwritten_by_accident(model, tmp_path):
    plan = PLANS["restkv"]
    first, second = start(model, plan), start(model, plan)
    second = dataclasses.replace(second, token=second.token + 1)
    folder, given = tmp_path / "saved", {"plan": plan, "model": model, "model_id": "tiny"}
    save_cache(folder, first, **given)
    with pytest.raises(CacheFolderError, match="exists already"):
        save_cache(folder, second, **given)
    same(restore_cache(folder, model=model, model_id="tiny").state, first)
    save_cache(folder, second, **given, overwrite=True)
    same(restore_cache(folder, model=model, model_id="tiny").state, second)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    with pytest.raises(CacheFolderError, match="not a whole saved cache"):
        save_cache(tmp_path / "thesis", first, **given, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"
