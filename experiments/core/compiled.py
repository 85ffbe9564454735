"""Compiled programs outlive the process: the next run of the same shapes does not compile again."""

from __future__ import annotations

import jax

from models.sources import cache_folder

# Least recently used programs go first.
MOST_BYTES = 2**31


def keep_compiled_programs() -> None:
    """Keeps XLA's programs in this package's cache folder.

    Without effect where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`) or switched
    the cache off (`JAX_ENABLE_COMPILATION_CACHE=false`).
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
