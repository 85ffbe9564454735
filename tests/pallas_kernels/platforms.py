"""Programs for accelerators on a CPU host: lowered, and for TPU compiled where libtpu is there."""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"
)
_TOPOLOGIES = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}


def described(kind, platform):
    """A device that is not there, in context: some kernels ask for it when they are lowered."""
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=1 if platform == "tpu" else None, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def shapes_of(args, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)


def lowered(op, args, platform):
    """StableHLO for "cpu", "tpu" or "cuda"."""
    kinds = {"tpu": "TPU v5e", "cuda": "NVIDIA H200", "cpu": "cpu"}
    with described(kinds[platform], {"cuda": "gpu"}.get(platform, platform)):
        traced = jax.jit(op).trace(*shapes_of(args))
        return traced.lower(lowering_platforms=(platform,)).as_text()


@functools.cache
def _tpu(kind):
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGIES[kind])


def compiled_for_tpu(op, args, kind):
    """Optimised HLO of a real compilation for one TPU core that is not there."""
    sharding = jax.sharding.SingleDeviceSharding(_tpu(kind).devices[0])
    with described(kind, "tpu"):
        return jax.jit(op).trace(*shapes_of(args, sharding)).lower().compile().as_text()
