"""Programs for devices that are not here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

TOPOLOGIES = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}

GPU = "NVIDIA H200"
# What XLA asks of it to compile for it.
_GPU_CONFIG = f"""
platform_name: "CUDA"
device_description_str: "{GPU}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  memory_bandwidth: 4915200000000
  l2_cache_size: 62914560
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}}
"""


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor the package around it
        return False


needs_libtpu = pytest.mark.skipif(
    not _installed("libtpu"), reason="compiling for TPU needs the extra tpu-aot"
)
needs_cuda_plugin = pytest.mark.skipif(
    not all(map(_installed, ("jax_cuda13_plugin", "jax_triton", "nvidia.cu13", "nvidia.cudnn"))),
    reason="compiling for GPU needs the extra gpu-aot",
)


@contextlib.contextmanager
def users_settings() -> Iterator[None]:
    """In it, programs are compiled as a user's are; `tests/conftest.py` is for those that run."""
    of_tests = jax.config.read("jax_disable_most_optimizations")
    try:
        jax.config.update("jax_disable_most_optimizations", False)
        with jax.default_matmul_precision(None):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", of_tests)


@contextlib.contextmanager
def device(kind: str) -> Iterator[None]:
    """In it, programs are for one device of this kind, and compiled as a user's are."""
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    cores = 1 if platform == "tpu" else None
    of = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    mesh = AbstractMesh((), (), abstract_device=of)
    with users_settings(), jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered(f: Callable[..., Any], *args: Any, kind: str = "TPU v5e") -> str:
    """The StableHLO for a kind of device."""
    platform = "tpu" if kind.startswith("TPU") else "cuda"
    with device(kind):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def compiled(f: Callable[..., Any], *args: Any, kind: str, **jit: Any) -> jax.stages.Compiled:
    """What the compiler for a device makes of it, kernels included; needs libtpu or the plugin."""
    from jax.sharding import SingleDeviceSharding

    sharding = SingleDeviceSharding(devices(kind)[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with device(kind):
        return jax.jit(f, **jit).trace(*args).lower().compile()


def compiled_on_mesh(f: Callable[..., Any], *args: Any, kind: str, **jit: Any) -> Any:
    """The same for several devices; the arguments' shapes have shardings on a `mesh` of them."""
    platform = "tpu" if kind.startswith("TPU") else "cuda"
    with users_settings():
        return jax.jit(f, **jit).trace(*args).lower(lowering_platforms=(platform,)).compile()


def mesh(kind: str) -> Mesh:
    """Two devices along the batch times two along the heads."""
    axes = ("data", "model")
    return Mesh(np.reshape(devices(kind), (2, 2)), axes, axis_types=(AxisType.Auto,) * 2)


@functools.cache
def devices(kind: str) -> list[Any]:
    """Four of a kind, for which programs can be compiled."""
    from jax.experimental import topologies

    if kind == GPU:
        # The assembler that comes with the extra, before that of another CUDA on this host.
        (cuda,) = importlib.import_module("nvidia.cu13").__path__
        os.environ["PATH"] = os.pathsep.join([f"{cuda}/bin", os.environ["PATH"]])
        return topologies.get_topology_desc(
            platform="cuda", target_config=_GPU_CONFIG, topology="1x1x4"
        ).devices
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices
