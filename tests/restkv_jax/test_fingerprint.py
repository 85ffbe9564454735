"""Checksums and fingerprints depend on values and their places, on nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Llama, ModelConfig
from models.rope import RopeConfig
from models.sharding import place_weights
from restkv_jax.decode import MeshRules, shard, weights_fingerprint, with_output_factors
from restkv_jax.factors import FactoredLM
from restkv_jax.fingerprint import checksum
from tests.restkv_jax import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32"])
def test_checksums_tell_values_and_places_apart(dtype):
    x = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
    sums = [int(checksum(y)) for y in (x, x[::-1], jnp.swapaxes(x, 0, 2), x.at[1, 2, 3].set(0))]
    assert len(set(sums)) == 4
    assert sums[0] == int(checksum(jnp.asarray(np.asarray(x))))
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("a")))
    assert int(checksum(split)) == sums[0]


def test_every_weight_counts_in_the_fingerprint():
    model = tiny.make()
    prints = {weights_fingerprint(model)}
    for name, value in model.params.items():
        place = tuple(size // 2 for size in value.shape)
        params = {**model.params, name: value.at[place].add(1e-5)}
        prints.add(weights_fingerprint(dataclasses.replace(model, params=params)))
    assert len(prints) == 1 + len(model.params)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_neither_factors_nor_a_mesh_count_in_the_fingerprint(dtype):
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        num_layers=1,
        hidden_size=32,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        mlp_size=40,
        rms_eps=1e-5,
        rope=RopeConfig(),
        windows=(None,),
    )
    model, rules = Llama.init(config, dtype=dtype), MeshRules.over(data=2, model=4)
    factored, placed = with_output_factors(model), place_weights(model, rules)
    of_the_same = [model, factored, shard(model, rules), shard(factored, rules)]
    of_the_same += [shard(placed, rules), shard(with_output_factors(placed), rules)]
    of_the_same += [FactoredLM(model=shard(model, rules), factors=factored.factors)]
    prints = {weights_fingerprint(one) for one in of_the_same}
    assert len(prints) == 1

    leaves, structure = jax.tree.flatten(model)
    for i, leaf in enumerate(leaves):
        changed = leaf.at[(0,) * leaf.ndim].add(1)
        other = jax.tree.unflatten(structure, [*leaves[:i], changed, *leaves[i + 1 :]])
        given = dataclasses.replace(factored, model=other)  # the factors stay the same
        prints |= {weights_fingerprint(one) for one in (other, shard(given, rules))}
    assert len(prints) == 1 + len(leaves)
