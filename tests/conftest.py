"""Set before any array is made: exact products, eight CPU devices, and quick compilation."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# The plugin that the extra `gpu-aot` brings compiles without a GPU if none is asked for. Otherwise
# it looks for libraries that only running needs, and is not registered without them.
if importlib.util.find_spec("jax_cuda13_plugin") and not Path("/dev/nvidiactl").exists():
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs of tests run once and briefly: compiling them well takes longer than it saves.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_compilation_cache", False)  # nothing of them in the user's folder
# XLA's older way to write loops on CPU compiles in half the time (where a version has no other way,
# the option means nothing), and so does a program in one piece, which no second core waits for. The
# processes that tests start inherit both.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')}"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)

# They compile whole models, or start processes of their own.
LONGEST = {
    "test_readme.py",
    "test_matrix.py",
    "test_packaged_models.py",
    "test_notebooks.py",
    "test_suite.py",
    "test_lm_eval.py",
    "test_perplexity.py",
    "test_efficiency.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few and long tests first, so that no process waits for another's last file."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Every program on CPU holds memory maps, and a process may only have so many of them."""
    yield
    jax.clear_caches()
    gc.collect()
