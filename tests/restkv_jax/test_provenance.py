"""A saved cache fits no model and no plan but its own, as far as either can be told."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from models import Llama, ModelConfig
from models.rope import LinearScaling, RopeConfig
from restkv_jax.decode import (
    H2O,
    AdaKV,
    CacheFolderError,
    CachePlan,
    CriticalKV,
    FrozenHeads,
    Full,
    MeshRules,
    RestKV,
    SnapKV,
    Streaming,
    init_cache,
    prefill,
    prefill_bounded,
    prefill_chunked,
    restore_cache,
    save_cache,
    shard,
    with_output_factors,
)
from restkv_jax.provenance import check_made_by
from tests.restkv_jax import tiny

W, COLUMNS = 4, 64
CARRIED = CachePlan(policy=H2O(window=W), budget=12, decode_budget=12, evict_every=5)
SNAPKV = CachePlan(policy=SnapKV(window=W), budget=12, headroom=32)
PLANS = {
    "restkv": CachePlan(policy=RestKV(window=W), budget=12, headroom=32),
    "other budget": dataclasses.replace(SNAPKV, budget=10),
    "larger": dataclasses.replace(SNAPKV, budget=24),
    "ratio": dataclasses.replace(SNAPKV, budget=0.25),
    "by layer": dataclasses.replace(SNAPKV, budget=(20, 8)),
    "ratios by layer": dataclasses.replace(SNAPKV, budget=(0.5, 0.125)),
    "full": CachePlan(policy=Full(), headroom=8),
    "query heads": dataclasses.replace(
        SNAPKV, policy=CriticalKV(window=W, granularity="query_head")
    ),
    "adakv": dataclasses.replace(SNAPKV, heads=AdaKV()),
    "lists": dataclasses.replace(SNAPKV, heads=AdaKV(lists=2)),
    "frozen": dataclasses.replace(SNAPKV, heads=FrozenHeads(slots=((10, 14), (16, 7)))),
    "int8": dataclasses.replace(SNAPKV, storage="int8"),
    "by slot": CachePlan(policy=Streaming(sinks=2), budget=12, headroom=32, rope="slot"),
    "evicts": CARRIED,
    "evicts by another": dataclasses.replace(CARRIED, policy=SnapKV(window=W)),
    "evicts later": dataclasses.replace(CARRIED, budget=0.5, evict_every=9),
}


def empty(model, plan, columns=COLUMNS):
    """A cache of the form that a prefill gives."""
    specs, dtype = model.layer_specs, model.kv_dtype
    return init_cache(specs, plan, batch=2, prompt_columns=columns, dtype=dtype)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "saved"
    save_cache(folder, empty(model, CARRIED), plan=CARRIED, model=model, model_id="tiny")
    return folder


def test_another_model_is_refused(model, saved):
    with pytest.raises(CacheFolderError, match=r"model_id: the cache has 'tiny', got 'other'"):
        restore_cache(saved, model=model, model_id="other")
    with pytest.raises(CacheFolderError, match=r"layer_specs\[1\].window: .* has None, got 9"):
        restore_cache(saved, model=tiny.with_windows(model, (None, 9)), model_id="tiny")
    with pytest.raises(CacheFolderError, match="layers of the model: the cache has 2, got 3"):
        restore_cache(saved, model=tiny.make(layers=3), model_id="tiny")
    late = model.params["mlp"].at[-1, -1, -1].add(1e-6)
    other = dataclasses.replace(model, params={**model.params, "mlp": late})
    with pytest.raises(CacheFolderError, match=r"weights: the cache has '[0-9a-f]{16}', got"):
        restore_cache(saved, model=other, model_id="tiny")


def llama(**changes):
    """Equal weights, whatever else changes."""
    base = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 61,
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_size": 32,
        "rms_eps": 1e-5,
        "rope": RopeConfig(scaling=LinearScaling(factor=2.0)),
        "windows": (None, 9),  # JSON has lists for tuples
    }
    return Llama.init(ModelConfig(**(base | changes)))


def test_equal_weights_that_are_computed_with_otherwise_are_refused(tmp_path):
    model, folder = llama(), tmp_path / "saved"
    save_cache(folder, empty(model, CARRIED), plan=CARRIED, model=model, model_id="llama")
    restore_cache(folder, model=llama(), model_id="llama")
    with pytest.raises(CacheFolderError, match=r"activation: the cache has 'silu', got 'gelu_t"):
        restore_cache(folder, model=llama(activation="gelu_tanh"), model_id="llama")
    other = llama(rms_eps=1e-2)
    for given in (other, shard(with_output_factors(other), MeshRules.over(data=2, model=2))):
        with pytest.raises(CacheFolderError, match=r"rms_eps: the cache has 1e-05, got 0.01"):
            restore_cache(folder, model=given, model_id="llama")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a caller's own model. A function is no JSON, so that it cannot be noted."""

    gain: float = 1.0
    sizes: tuple[int, ...] = (1, 2)
    inner: object = None
    activation: object = jnp.tanh


@dataclasses.dataclass(frozen=True)
class Unlike:
    """Of another class, which names one thing alike."""

    gain: float = 1.0
    width: int = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Configured(tiny.TinyModel):
    config: object = dataclasses.field(default=None, metadata={"static": True})


def test_configurations_are_compared_as_far_as_both_have_them(tmp_path):
    def of(config):
        return Configured(**vars(tiny.make()), config=config)

    folder = tmp_path / "saved"
    noted = Settings(inner=Settings())
    save_cache(folder, empty(of(noted), CARRIED), plan=CARRIED, model=of(noted), model_id="tiny")
    description = folder / "cache" / "metadata"
    inner = {"class": "Settings", "gain": 1.0, "sizes": [1, 2], "inner": None}
    found = json.loads(description.read_text())
    assert found["model"]["config"] == {"gain": 1.0, "sizes": [1, 2], "inner": inner}
    for other, message in (
        (Settings(inner=Settings(), gain=2.0), "config.gain: the cache has 1.0, got 2.0"),
        (Settings(inner=Settings(), sizes=(1, 3)), r"sizes: the cache has \[1, 2\], got \[1, 3\]"),
        (Settings(inner=Settings(gain=0.5)), "config.inner: .*'gain': 1.0.*'gain': 0.5"),
    ):
        with pytest.raises(CacheFolderError, match=message):
            restore_cache(folder, model=of(other), model_id="tiny")
    unknown = dataclasses.replace(noted, activation=jnp.sin), Unlike(), {"gain": 2.0}, None
    for config in unknown:
        restore_cache(folder, model=of(config), model_id="tiny")
    del found["model"]["config"]  # as earlier versions wrote it
    description.write_text(json.dumps(found))
    restore_cache(folder, model=of(Settings(gain=2.0)), model_id="tiny")


def test_a_cache_is_saved_with_its_own_plan_and_model(model, tmp_path):
    def refused(message, **other):
        given = {"plan": CARRIED, "model": model, "model_id": "tiny", **other}
        with pytest.raises(ValueError, match=message):
            save_cache(tmp_path / "saved", given.pop("state", empty(model, CARRIED)), **given)
        assert not (tmp_path / "saved").exists()

    cache = empty(model, CARRIED)
    refused("plan: evicts None while decoding", plan=PLANS["restkv"])
    refused("plan: storage is 'int8'", plan=dataclasses.replace(CARRIED, storage="int8"))
    other = dataclasses.replace(cache, by_slot=True)
    refused("plan: rope is 'true', but the cache has by_slot=True", state=other)
    refused("model: 3 layers, but the cache has 2", model=tiny.make(layers=3))
    refused("state: expected a KVCache or a DecodeState, got list", state=[])
    refused(
        r"plan: its layers have \[102, 102\] slots, as near to the cache's \[44, 44\]",
        state=empty(model, PLANS["restkv"]),
        plan=CachePlan(policy=SnapKV(), budget=99, headroom=3),
    )
    refused("heads with a set of their own in layer 0: .* has 4, .* 2", model=tiny.make(kv_heads=4))
    refused("size of a head in layer 0: .* has 4, this one 8", model=tiny.make(size=4))
    refused("dtype in layer 0: .* has bfloat16, ", model=tiny.cast(model, jnp.bfloat16))
    refused("sliding window in layer 1: .*True", model=tiny.with_windows(model, (None, 7)))
    lists = empty(model, PLANS["lists"])
    one = dataclasses.replace(PLANS["lists"], heads=AdaKV())
    refused("lists that heads share in layer 0: .* has 1, this one 2", state=lists, plan=one)


# Slots do not tell more: a ratio or everything may be kept of a prompt of any length,
# and a bounded prefill leaves more slots than its plan asks for.
ALSO = {
    "restkv": {"other budget", "ratio", "full"},
    "other budget": {"ratio", "full"},
    "larger": {"restkv", "other budget", "ratio", "full"},
    "ratio": {"restkv", "other budget", "full"},
    "full": {"restkv", "other budget", "larger", "ratio"},
    "evicts later": {"evicts"},
}


def fits(cache, plan, model):
    try:
        check_made_by(cache, plan, model)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_gives_no_such_cache_is_refused(model, name):
    cache = empty(model, PLANS[name])
    found = {other for other, plan in PLANS.items() if fits(cache, plan, model)}
    assert found == {name} | ALSO.get(name, set())


def test_a_ring_tells_how_long_the_prompt_was():
    """One that the prompt and the headroom do not fill has as many slots as both need."""
    model = tiny.with_windows(tiny.make(), (None, 200))
    cache = empty(model, PLANS["ratio"])
    assert [cache.slots(layer) for layer in range(2)] == [16 + 32, COLUMNS + 32]
    half = dataclasses.replace(PLANS["ratio"], budget=0.125)
    assert fits(cache, PLANS["ratio"], model)
    assert not fits(cache, half, model)  # of a prompt of twice the length
    assert not fits(cache, PLANS["restkv"], model)


@pytest.mark.parametrize("windows", [(None, None), (None, 9), (200, None), (7, 7)], ids=str)
def test_a_plan_fits_its_caches_of_prompts_of_any_length(windows):
    model = tiny.with_windows(tiny.make(), windows)
    pyramid = dataclasses.replace(PLANS["larger"], layers="pyramid")
    plans = [*PLANS.values(), pyramid, dataclasses.replace(pyramid, budget=0.4)]
    if any(windows):
        plans.remove(PLANS["by slot"])
    if None not in windows:
        plans.remove(PLANS["frozen"])
    for plan in plans:
        for columns in (1, 2, 31, 64, 1000):
            cache = jax.eval_shape(lambda plan=plan, n=columns: empty(model, plan, n))
            check_made_by(cache, plan, model)


def test_a_plan_fits_what_prompts_in_pieces_and_probes_give():
    model = tiny.with_windows(tiny.make(), (None, 9))
    tokens, valid = jnp.zeros((2, COLUMNS), jnp.int32), jnp.ones((2, COLUMNS), bool)

    def shapes(function, **options):
        return jax.eval_shape(functools.partial(function, **options), model, tokens, valid)[1]

    ratio, evicts = PLANS["ratio"], PLANS["evicts by another"]
    for (cache,) in (
        shapes(prefill, plans=(ratio,), probe=23),
        shapes(prefill_chunked, plans=(ratio,), piece=24),
    ):
        check_made_by(cache, ratio, model)
    for plan, piece, slots in ((SNAPKV, 3, 12 + 32), (SNAPKV, 40, 12 + 40), (evicts, 40, 12 + 40)):
        cache = shapes(prefill_bounded, plan=plan, piece=piece)
        assert [cache.slots(layer) for layer in range(2)] == [slots, 9]
        check_made_by(cache, plan, model)
