"""Programs for devices that are not here."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

TOPOLOGIES = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)


def device(kind: str) -> Any:
    """A context in which programs are for one device of this kind."""
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    cores = 1 if platform == "tpu" else None
    of = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=of))


def lowered(f: Callable[..., Any], *args: Any, kind: str = "TPU v5e") -> str:
    """The StableHLO for a kind of device."""
    platform = "tpu" if kind.startswith("TPU") else "cuda"
    with device(kind):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def compiled(f: Callable[..., Any], *args: Any, kind: str, **jit: Any) -> jax.stages.Compiled:
    """What the TPU compiler makes of it, Mosaic kernels included; needs libtpu."""
    from jax.sharding import SingleDeviceSharding

    sharding = SingleDeviceSharding(devices(kind)[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with device(kind):
        return jax.jit(f, **jit).trace(*args).lower().compile()


@functools.cache
def devices(kind: str) -> list[Any]:
    """Those of a small TPU slice, for which programs can be compiled; needs libtpu."""
    from jax.experimental import topologies

    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices
