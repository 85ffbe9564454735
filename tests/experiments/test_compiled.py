"""Programs on disk, found by a second process; programs in memory, let go when they are many."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.core import compiled
from experiments.core.engine import EvictionEngine
from experiments.core.likelihood import follow
from experiments.core.options import Slots, parse_policy
from experiments.core.plans import make_plan
from restkv_jax.decode import pad_prompts, prefill
from tests.restkv_jax import tiny

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


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_programs_go_when_they_take_too_many_maps(monkeypatch, share):
    monkeypatch.setattr(compiled, "MOST_MAPS", share)
    traced = []
    twice = jax.jit(lambda x: (traced.append(x), 2 * x)[1])
    for _ in range(3):
        compiled.let_programs_go()
        assert twice(3) == 6
    assert len(traced) == (1 if share else 3)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
def test_nothing_changes_when_programs_go(monkeypatch):
    """Before every policy, whether it answers or is asked for likelihoods."""
    gone, clear = [], jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: (gone.append(1), clear()))
    model, prompt = tiny.make(), [3 + i * i % 40 for i in range(50)]
    policies = ("streaming", "snapkv:window=4")
    plans = {text: make_plan(parse_policy(text), Slots(24), headroom=40) for text in policies}

    def found():
        engine = EvictionEngine(model, plans, longest_prompt=64, weights_bytes=0)
        answers = engine.answer(prompt, policies=policies, max_new_tokens=7, stop_ids=(), seed=0)
        logits, caches = prefill(model, *pad_prompts([prompt]), plans=tuple(plans.values()))
        likely = [follow(model, logits, cache, prompt[:9]).logprobs for cache in caches]
        return [answers[text].token_ids for text in policies], likely

    (tokens, likely), before = found(), len(gone)
    monkeypatch.setattr(compiled, "MOST_MAPS", 0.0)
    again, likely_again = found()
    assert (before, len(gone)) == (0, 2 * len(policies))
    assert tokens == again
    np.testing.assert_array_equal(likely, likely_again)
