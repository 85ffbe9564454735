"""Programs on disk: a second process finds what the first one compiled."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from experiments.core.compiled import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(sum(name.endswith("cache_hits") for name in hits), jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    hits, folder = done.stdout.split()
    return int(hits), folder


def test_the_second_process_compiles_nothing_anew(tmp_path):
    folder = str(tmp_path / "xla")
    assert run(RESTKV_CACHE=str(tmp_path)) == (0, folder)
    assert os.listdir(folder)
    hits, _ = run(RESTKV_CACHE=str(tmp_path))
    assert hits > 0


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    mine = str(tmp_path / "mine")
    assert run(RESTKV_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR=mine)[1] == mine
    assert not (tmp_path / "xla").exists()
