"""The figures that state what bfloat16 costs."""

import numpy as np
import pytest

from experiments.precision import differences


def test_differences_of_equal_and_of_shifted_logits():
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    same = differences(logits, logits)
    assert same == {"max": 0.0, "mean": 0.0, "kl": pytest.approx(0.0, abs=1e-6), "top1": 1.0}
    shifted = differences(logits, logits + 1.0)
    assert shifted["max"] == pytest.approx(1.0)
    assert shifted["kl"] == pytest.approx(0.0, abs=1e-6)


def test_divergence_equals_the_definition():
    p, q = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.1, 0.2, 0.7])
    found = differences(np.log(p)[None], np.log(q)[None])
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert found["top1"] == 0.0
