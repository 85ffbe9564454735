"""The benchmark of many caches from one prefill."""

import pytest

from experiments.many_plans import POLICIES, Timing, measure, ratio
from restkv_jax.decode import CachePlan, SnapKV, Streaming
from tests.restkv_jax import tiny


def test_every_program_is_timed_in_every_round():
    programs = {
        "none": (),
        "many": tuple(
            CachePlan(policy=policy, budget=budget)
            for policy in (Streaming(), SnapKV(window=4))
            for budget in (8, 12)
        ),
    }
    timings = measure(tiny.make(layers=1), list(range(40)), programs, repeats=3)
    assert list(timings) == ["none", "many"]
    for timing in timings.values():
        assert len(timing.wall_s) == len(timing.cpu_s) == 3
        assert min(timing.wall_s) > 0.0
        assert timing.compile_s > 0.0


def test_ratio_is_the_median_of_the_rounds():
    """A round in which the machine was busy slows both programs and changes nothing."""
    timings = {
        "many": Timing(0.0, 0.0, wall_s=(3.0, 30.0, 4.0), cpu_s=(1.0, 1.0, 1.0)),
        "one": Timing(0.0, 0.0, wall_s=(2.0, 20.0, 2.0), cpu_s=(1.0, 2.0, 4.0)),
    }
    assert ratio(timings, "many", "one") == pytest.approx(1.5)
    assert ratio(timings, "many", "one", "cpu_s") == pytest.approx(0.5)


def test_ten_policies_are_compared():
    assert len(set(POLICIES)) == 10
