"""Ops inside of a `jax.shard_map` with its check: what they say of axes, and what they compute."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.decode_attention import NewEntry, decode_attention
from pallas_kernels.decode_attention.specs import Spec as DecodeSpec
from pallas_kernels.masked_eviction import masked_eviction, top_mask
from pallas_kernels.masked_eviction.specs import Spec as EvictionSpec
from pallas_kernels.slot_write import write_slots
from pallas_kernels.varying import outputs_like, vary_like, varying_axes
from pallas_kernels.window_scores import window_scores
from pallas_kernels.window_scores.specs import Spec as ScoreSpec
from tests.pallas_kernels.test_slot_write import example

BOTH, HEADS, ROWS = P("data", "model"), P("model"), P("data")


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])


def split(op, in_specs, out_specs):
    """With the check, which is what `jax.shard_map` does by itself."""
    return jax.jit(jax.shard_map(op, mesh=mesh(), in_specs=in_specs, out_specs=out_specs))


def assert_same(op, in_specs, out_specs, args, *, rtol=0):
    """What one device computes, bit by bit unless `rtol` says otherwise.

    Kernels are traced with the check, too; what runs on CPU are their references. JAX's
    interpreter of kernels does not pass it.
    """
    ours, theirs = split(op, in_specs, out_specs)(*args), jax.jit(op)(*args)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol)


def test_what_is_made_differs_along_the_axes_of_what_it_is_made_from():
    def inside(x, y, z):
        both = {"data", "model"}
        assert list(map(varying_axes, (x, y, z, (x, y)))) == [{"data"}, {"model"}, set(), both]
        zeros = jnp.zeros(2)
        made = vary_like((zeros, x, z), y, z)
        assert list(map(varying_axes, made)) == [{"model"}, both, {"model"}]
        assert vary_like(zeros, z) is zeros
        shape = outputs_like({"a": jax.ShapeDtypeStruct((3,), jnp.int8)}, x, [y])["a"]
        assert (shape.shape, shape.dtype) == ((3,), jnp.int8)
        assert shape.manual_axis_type.varying == both
        return made[1]

    args = jnp.ones(4), jnp.ones(4), jnp.ones(4)
    assert split(inside, (ROWS, HEADS, P()), P(("data", "model")))(*args).shape == (8,)
    assert varying_axes(args) == set()
    unchecked = jax.shard_map(
        lambda x: x + len(varying_axes(x)),
        mesh=mesh(),
        in_specs=ROWS,
        out_specs=ROWS,
        check_vma=False,
    )
    np.testing.assert_array_equal(unchecked(args[0]), args[0])


@pytest.mark.parametrize("kind", ["attention", "aggregated", "per_query"])
def test_window_scores(kind):
    spec = ScoreSpec(
        name="mesh", kind=kind, batch=2, heads=4, kv_heads=2, window=8, columns=300, head_dim=64
    )
    op = functools.partial(window_scores, form=spec.form)
    specs = (BOTH, BOTH, BOTH, HEADS, P(), ROWS, ROWS)
    # Fewer heads on each device: sums over the hidden dimension are taken in another order.
    assert_same(op, specs, BOTH, spec.inputs(jnp.float32), rtol=4e-6)


def test_masked_eviction():
    spec = EvictionSpec(
        name="mesh", batch=2, sets=4, kv_heads=2, columns=300, capacity=40, head_dim=64, int8=True
    )
    op = functools.partial(masked_eviction, **spec.options)
    assert_same(op, (BOTH, BOTH, BOTH, BOTH, ROWS), BOTH, spec.inputs(jnp.float32))


def test_top_mask():
    """With ties, for which it searches a second time."""
    values = np.random.default_rng(0).integers(0, 9, (4, 6, 50)).astype(np.float32)
    assert_same(top_mask, BOTH, BOTH, (values, np.full((4, 6), 20)))


def test_decode_attention():
    spec = DecodeSpec(name="mesh", batch=2, heads=8, cache_heads=4, slots=96, head_dim=64, layers=2)
    op = functools.partial(decode_attention, **spec.options, weights=True)
    specs = (BOTH, BOTH, BOTH, BOTH, ROWS, None, NewEntry(k=BOTH, v=BOTH, slot=ROWS))
    assert_same(op, specs, BOTH, (*spec.inputs(jnp.float32), spec.new(jnp.float32)))


def test_slot_write():
    assert_same(write_slots, ROWS, ROWS, example(jnp.float32))
