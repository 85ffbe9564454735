"""Which implementation runs where."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.dispatch import Kernel, dispatch


def double(x):
    return 2.0 * x


def on_tpu(x):
    return jnp.sin(x) + x  # no double at all: which one ran is seen by the value


def run(x, implementation=None, kernels=None):
    if kernels is None:
        kernels = (
            Kernel("pallas_tpu", on_tpu),
            Kernel("triton", on_tpu, refusal="head dim 80 is no power of two"),
        )
    return dispatch("op", implementation, x, reference=double, kernels=kernels)


def lowered(platform, kernels=None):
    x = jnp.ones(3)
    f = jax.jit(lambda x: run(x, kernels=kernels))
    return f.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_platform_is_the_one_lowered_for():
    assert "sine" in lowered("tpu")
    assert "sine" not in lowered("cpu")
    assert "sine" not in lowered("cuda")  # refused
    assert "sine" in lowered("cuda", (Kernel("pallas_gpu", on_tpu),))
    second = (Kernel("triton", jnp.exp, refusal="no"), Kernel("pallas_gpu", on_tpu))
    assert "sine" in lowered("cuda", second)


def test_a_program_for_cpu_holds_the_reference_alone():
    x = jnp.ones(3)
    ours, plain = (jax.jit(f).lower(x).compile().as_text() for f in (run, double))
    assert "conditional" not in ours
    assert ours.count("multiply(") == plain.count("multiply(") == 1


def test_a_named_implementation_runs_or_says_why_not():
    x = jnp.ones(3)
    np.testing.assert_array_equal(run(x), double(x))
    np.testing.assert_array_equal(run(x, "xla"), double(x))
    np.testing.assert_array_equal(run(x, "pallas_tpu"), on_tpu(x))
    with pytest.raises(NotImplementedError, match=r"op: .*'triton': head dim 80 is no power"):
        run(x, "triton")
    with pytest.raises(NotImplementedError, match="'pallas_gpu': there is no such kernel"):
        run(x, "pallas_gpu")
    with pytest.raises(ValueError, match=r"implementation: expected None or one of .*'cuda'"):
        run(x, "cuda")


def test_derivatives_are_the_references():
    x = jnp.arange(3.0)
    for name in (None, "pallas_tpu"):
        np.testing.assert_array_equal(jax.grad(lambda x, n=name: run(x, n).sum())(x), [2.0] * 3)


def test_kernels_run_only_where_the_mesh_is_split_by_hand():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    x, split = jnp.ones(4), PartitionSpec("data")
    with jax.set_mesh(mesh):
        with pytest.raises(NotImplementedError, match=r"\['data'\].* jax.shard_map"):
            run(x, "pallas_tpu")
        text = jax.jit(run).trace(x).lower(lowering_platforms=("tpu",)).as_text()
        assert "sine" not in text

        @jax.jit
        @jax.shard_map(in_specs=split, out_specs=split, check_vma=False)
        def inside(x):
            return run(x, "pallas_tpu")

        np.testing.assert_allclose(inside(x), on_tpu(x), rtol=1e-6)
