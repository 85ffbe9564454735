"""That the simulator's races are seen, on which the kernels' tests rely."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@pytest.mark.parametrize("waits_first", [True, False])
def test_a_copy_that_nobody_waits_for_is_a_race(simulator, capsys, waits_first):
    def kernel(x_ref, y_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, y_ref.at[pl.ds(0, 8)], semaphore)
        copy.start()
        if waits_first:
            copy.wait()
        y_ref[...] += 1.0
        if not waits_first:
            copy.wait()

    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=simulator,
    )
    try:
        jax.block_until_ready(run(jnp.ones((8, 128))))
        told = capsys.readouterr().out
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12
        told = str(error)
    assert ("RACE DETECTED" in told) == (not waits_first)
