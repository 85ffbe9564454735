"""The simulator of a TPU, for kernels of all ops."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def simulator(capsys):
    """What `interpret` takes; before JAX 0.12 the races that it finds are only printed."""
    yield pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    assert "RACE DETECTED" not in capsys.readouterr().out
