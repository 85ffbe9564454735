"""Set before any array is made: exact products, and eight CPU devices."""

import gc
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Every program on CPU holds memory maps, and a process may only have so many of them."""
    yield
    jax.clear_caches()
    gc.collect()
