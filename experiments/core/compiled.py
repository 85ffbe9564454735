"""Compiled programs: they outlive the process, and are let go before there are too many of them."""

from __future__ import annotations

from pathlib import Path

import jax

from models.sources import cache_folder

# Least recently used programs go first.
MOST_BYTES = 2**31
# Of the memory maps that Linux allows a process.
MOST_MAPS = 0.5


def keep_compiled_programs() -> None:
    """Keeps XLA's programs in this package's cache folder.

    Without effect where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`) or switched
    the cache off (`JAX_ENABLE_COMPILATION_CACHE=false`).
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def let_programs_go() -> None:
    """Forgets what was compiled if that takes more than `MOST_MAPS` of the maps there are.

    XLA:CPU maps code and data of every kernel apart: thousands of maps for a program of a network,
    where Linux allows a process 65,530, and LLVM ends the process that asks for more. A policy that
    evicts while decoding has a program of its own. Whatever is needed again comes from the cache
    folder.
    """
    try:
        with Path("/proc/self/maps").open() as maps:
            taken = sum(1 for _ in maps)
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:  # not Linux
        return
    if taken > MOST_MAPS * allowed:
        jax.clear_caches()
