"""Programs that are run a few times only."""

import functools

import jax
import jax.numpy as jnp


def quickly(function, **static):
    """`function` jitted, compiled without optimising the machine code.

    That is what most of the time of a test of a tiny model goes into. Programs live as long as
    what is returned.

    Args:
        function: jitted already, or not.
        **static: its static arguments.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function)

    @functools.cache
    def program(structure, kinds):
        shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
        lowered = jitted.lower(*jax.tree.unflatten(structure, shapes), **static)
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})

    def run(*args):
        args = jax.tree.map(jnp.asarray, args)
        leaves, structure = jax.tree.flatten(args)
        return program(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))(*args)

    return run
