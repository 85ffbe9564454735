"""The networks against golden values of the reference implementation."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_attend, dense_logits
from model_fixtures import checkpoints

import models

LOGITS_MAX, LOGITS_MEAN = 5e-4, 5e-5
PROJECTIONS_MAX = 2e-4


@dataclasses.dataclass
class Case:
    folder: Path
    goldens: dict
    lm: models.LanguageModel


@pytest.fixture(scope="module", params=checkpoints("hf_tiny/*", wants="goldens.npz"))
def case(request):
    with np.load(request.param / "goldens.npz") as goldens:
        arrays = {key: goldens[key] for key in goldens.files}
    return Case(request.param, arrays, models.load(request.param))


def assert_close(got, wanted, *, max_diff=LOGITS_MAX, mean_diff=LOGITS_MEAN):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    difference = np.abs(got - wanted)
    assert np.isfinite(got).all()
    assert difference.max() <= max_diff
    assert difference.mean() <= mean_diff


def count(ids):
    """Positions of unpadded rows."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def ragged_positions(mask):
    return jnp.where(mask == 1, jnp.cumsum(mask, axis=1) - 1, -1)


def test_fixtures_logits(case):
    ids = jnp.asarray(case.goldens["input_ids"])
    assert_close(dense_logits(case.lm.model, ids, count(ids)), case.goldens["logits"])


def test_fixtures_layers(case, monkeypatch):
    """What enters and leaves each layer and each attention, layer by layer."""
    model, goldens = case.lm.model, case.goldens
    ids = jnp.asarray(goldens["input_ids"][:1])
    inner = dense_attend(model.layer_specs, count(ids))
    attended, entering = [], []

    def attend(layer, q, k, v, w_o, state):
        heads, _ = inner(layer, q, k, v, w_o, state)
        attended.append((layer, q, k, v, heads))
        return heads, state + 1

    block = type(model.layers[0])
    original = block.__call__

    def call(self, x, *args):
        entering.append(x)
        return original(self, x, *args)

    monkeypatch.setattr(block, "__call__", call)
    final, calls = model(ids, count(ids), attend, 0)

    num_layers = len(model.layer_specs)
    assert calls == num_layers
    assert [layer for layer, *_ in attended] == list(range(num_layers))
    assert_close(jnp.concatenate([*entering, final]), goldens["hidden_states"])
    for i in goldens["layers_dumped"]:
        _, q, k, v, heads = (np.asarray(x) for x in attended[i])
        for name, by_token in (("q", q), ("k", k), ("v", v)):
            assert_projection(by_token[0].swapaxes(0, 1), goldens[f"{name}_l{i}"])
        assert_projection(heads.reshape(ids.shape[1], -1), goldens[f"attn_in_l{i}"])
        update = model.layers[int(i)].attn.output(jnp.asarray(heads), model.kv_dtype)
        assert_projection(update[0], goldens[f"attn_out_l{i}"])


def assert_projection(got, wanted):
    assert_close(got, wanted, max_diff=PROJECTIONS_MAX, mean_diff=PROJECTIONS_MAX)


def test_fixtures_rope_frequencies(case):
    config = case.lm.config
    ropes = {"inv_freq": config.rope}
    if config.local_rope is not None:
        ropes = {"inv_freq_global": config.rope, "inv_freq_local": config.local_rope}
    for key, rope in ropes.items():
        frequencies = rope.frequencies(config.head_dim)
        assert frequencies.dtype == np.float32
        np.testing.assert_allclose(frequencies, case.goldens[key], rtol=1e-6)


def test_fixtures_ragged_batch(case):
    """Left padding changes nothing, whatever the padding tokens are."""
    ids, mask = jnp.asarray(case.goldens["ragged_ids"]), jnp.asarray(case.goldens["ragged_mask"])
    positions = ragged_positions(mask)
    logits = dense_logits(case.lm.model, ids, positions)
    assert jnp.isfinite(logits).all()
    assert_close(logits[:, -1], case.goldens["ragged_last_logits"])
    assert_close(logits[:, -1], case.goldens["ragged_last_logits_unpadded"])
    other_padding = jnp.where(mask == 1, ids, 1)
    np.testing.assert_array_equal(
        dense_logits(case.lm.model, other_padding, positions)[:, -1], logits[:, -1]
    )


def test_fixtures_greedy(case):
    """Each golden token is the argmax after the ones before it, so greedy decoding gives them."""
    new = case.goldens["greedy_tokens"]
    ids = jnp.concatenate([case.goldens["ragged_ids"], new], axis=1)
    mask = jnp.concatenate([case.goldens["ragged_mask"], np.ones_like(new)], axis=1)
    logits = dense_logits(case.lm.model, ids, ragged_positions(mask))
    first = ids.shape[1] - new.shape[1]
    np.testing.assert_array_equal(jnp.argmax(logits[:, first - 1 : -1], axis=-1), new)


def test_fixtures_long_prompt(case):
    """Beyond the original context or the window; only where a folder has such a prompt."""
    if "long_ids" not in case.goldens:
        return
    new = case.goldens["long_greedy"]
    ids = jnp.concatenate([case.goldens["long_ids"], new])[None]
    logits = dense_logits(case.lm.model, ids, count(ids))[0]
    length = len(case.goldens["long_ids"])
    assert_close(logits[:length], case.goldens["long_logits"])
    np.testing.assert_array_equal(jnp.argmax(logits[length - 1 : -1], axis=-1), new)


def test_fixtures_bfloat16(case):
    """Computes in bfloat16 but for norms, softmax and logits; loose, as that dtype is."""
    lm = models.load(case.folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.model)} == {jnp.dtype("bfloat16")}
    assert lm.weights_bytes == case.lm.weights_bytes // 2
    ids = jnp.asarray(case.goldens["input_ids"])
    logits = dense_logits(lm.model, ids, count(ids))
    assert logits.dtype == jnp.float32
    assert_close(logits, case.goldens["logits"], max_diff=4.0, mean_diff=0.2)


def test_fixtures_config_styles(case):
    """The same config in the spelling of other transformers versions."""
    for path in case.folder.glob("config.*.json"):
        assert models.ModelConfig.from_hf(json.loads(path.read_text())) == case.lm.config


def test_fixtures_strict_promotion(case):
    """Every broadcast and every cast in the network is explicit."""
    ids = jnp.asarray(case.goldens["input_ids"][:, :4])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            model = jax.tree.map(lambda leaf, to=dtype: leaf.astype(to), case.lm.model)

            def attend(layer, q, k, v, w_o, state, dtype=dtype):
                assert q.dtype == k.dtype == v.dtype == w_o.dtype == dtype
                return q, state

            hidden, _ = jax.eval_shape(
                lambda m, a=attend: m(ids, count(ids), a, jnp.zeros(())), model
            )
            assert hidden.dtype == dtype
            assert jax.eval_shape(lambda m, h: m.unembed(h), model, hidden).dtype == jnp.float32
