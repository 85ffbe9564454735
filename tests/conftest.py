"""Set before any array is made: exact products, eight CPU devices, and quick compilation."""

import gc
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Programs of tests run once and briefly: compiling them well takes longer than it saves.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_compilation_cache", False)  # nothing of them in the user's folder


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Every program on CPU holds memory maps, and a process may only have so many of them."""
    yield
    jax.clear_caches()
    gc.collect()
