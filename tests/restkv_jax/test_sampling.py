"""Drawing tokens: greedy, temperature, top-k, top-p, seeds, stops and limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CachePlan,
    Full,
    RestKV,
    Sampling,
    bucket_length,
    generate,
    pad_prompts,
    row_keys,
    sample,
)
from restkv_jax.sampling import truncate
from tests.restkv_jax import dense, tiny

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
PLAN = CachePlan(policy=Full(), headroom=32)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def kept(**options):
    return jnp.isfinite(truncate(LOGITS, Sampling(temperature=1.0, **options)))[0].tolist()


def test_top_k_and_top_p_cut_where_they_should():
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.4) == [True, False, False, False]
    assert kept(top_p=0.74) == [True, True, False, False]
    assert kept(top_p=0.76) == [True, True, True, False]
    assert kept(top_k=3, top_p=0.9) == [True, True, True, False]


def test_draws_follow_the_distribution():
    """20,000 draws at temperature 2; the bound is five standard errors."""
    count = 20_000
    logits = jnp.broadcast_to(LOGITS, (count, 4))
    tokens, logprobs = sample(logits, row_keys(0, count), Sampling(temperature=2.0))
    expected = np.asarray(jax.nn.softmax(LOGITS[0] / 2.0))
    share = np.bincount(tokens, minlength=4) / count
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()
    np.testing.assert_allclose(logprobs, np.asarray(LOGITS)[0][np.asarray(tokens)], atol=1e-6)


def test_a_row_draws_as_it_would_alone(model):
    r = np.random.default_rng(0)
    rows = [r.integers(0, 61, n).tolist() for n in (30, 12, 21)]
    sampling = Sampling(temperature=1.0, top_k=20)
    plan = CachePlan(policy=RestKV(window=4), budget=12, headroom=32)
    batch = generate(model, rows, plan=plan, max_new_tokens=12, sampling=sampling, seed=5, chunk=4)
    for b, row in enumerate(rows):
        alone = generate(
            model, [row], plan=plan, max_new_tokens=12, sampling=sampling, seed=5 + b, chunk=4
        )
        assert alone.rows()[0] == batch.rows()[b]
    again = generate(model, rows, plan=plan, max_new_tokens=12, sampling=sampling, seed=5, chunk=4)
    other = generate(model, rows, plan=plan, max_new_tokens=12, sampling=sampling, seed=99, chunk=4)
    assert again.rows() == batch.rows() != other.rows()


@pytest.mark.parametrize("form", [list, tuple, np.array, jnp.array, np.uint32])
def test_seeds_may_be_named_for_each_row(form):
    named = jax.random.key_data(row_keys(form([7, 5, 7]), 3))
    one_by_one = [jax.random.key_data(row_keys(seed, 1))[0] for seed in (7, 5, 7)]
    np.testing.assert_array_equal(named, one_by_one)


@pytest.mark.parametrize("form", [int, np.int64, np.array, jnp.array, np.uint32])
def test_one_seed_counts_up_from_row_to_row(form):
    counted = jax.random.key_data(row_keys(form(7), 3))
    np.testing.assert_array_equal(counted, jax.random.key_data(row_keys([7, 8, 9], 3)))
    traced = jax.jit(lambda seed: jax.random.key_data(row_keys(seed, 3)))(form(7))
    np.testing.assert_array_equal(traced, counted)


@pytest.mark.parametrize(
    "seed",
    [
        [7, 5],
        np.array([7, 5]),
        jnp.arange(4),
        np.zeros((3, 1), int),
        jnp.ones(3),
        1.5,
        [],
        [1.0] * 3,
    ],
    ids=repr,
)
def test_seeds_of_another_number_or_kind_are_refused(seed):
    with pytest.raises(ValueError, match=r"^seed: expected one integer, or one for each of 3 rows"):
        row_keys(seed, 3)


def test_seeds_reach_to_32_bits():
    last = row_keys(2**32 - 1, 1)
    assert (jax.random.key_data(last) == jax.random.key_data(row_keys([2**32 - 1], 1))).all()
    for seed in (-1, 2**32, [0, -1]):
        with pytest.raises(ValueError, match=r"^seed: expected from 0 to 2\*\*32 - 1, got"):
            row_keys(seed, 2)


def test_logprobs_are_the_models(model):
    prompt = [1, 2, 3, 4, 5]
    out = generate(
        model,
        [prompt],
        plan=PLAN,
        max_new_tokens=6,
        sampling=Sampling(temperature=1.5, top_p=0.9),
        seed=3,
    )
    sequence = prompt + out.rows()[0]
    log_probabilities = jax.nn.log_softmax(dense.logits_of(model, sequence), -1)
    expected = [log_probabilities[len(prompt) - 1 + i, t] for i, t in enumerate(out.rows()[0])]
    np.testing.assert_allclose(out.logprobs[0], expected, atol=2e-5)


def test_rows_end_at_stop_tokens_and_limits(model):
    rows = [[3, 1, 4, 1, 5], [9, 2, 6]]
    free = generate(model, rows, plan=PLAN, max_new_tokens=20, chunk=7)
    assert [len(row) for row in free.rows()] == [20, 20]
    stop = free.rows()[0][6]
    out = generate(model, rows, plan=PLAN, max_new_tokens=20, stop_tokens=[stop], chunk=7)
    for ours, whole in zip(out.rows(), free.rows(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert ours == whole[:end]
    assert (out.tokens[out.tokens < 0] == -1).all()
    assert (out.logprobs[out.tokens < 0] == 0).all()


def test_stop_tokens_are_barred_at_first(model):
    first = generate(model, [[3, 1, 4]], plan=PLAN, max_new_tokens=1).rows()[0][0]
    stopped = generate(model, [[3, 1, 4]], plan=PLAN, max_new_tokens=8, stop_tokens=[first])
    assert stopped.rows() == [[first]]
    out = generate(
        model,
        [[3, 1, 4]],
        plan=PLAN,
        max_new_tokens=8,
        stop_tokens=[first],
        sampling=Sampling(min_new_tokens=3),
    )
    assert first not in out.rows()[0][:3]
    assert len(out.rows()[0]) >= 3


def test_bucket_lengths():
    assert [bucket_length(n) for n in (1, 64, 65, 96, 97, 128, 129, 192, 193, 1000)] == [
        *(64, 64, 96, 96, 128, 128, 192, 192, 256, 1024)
    ]


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda m: Sampling(temperature=-1.0), "temperature"),
        (lambda m: Sampling(temperature=float("nan")), "temperature"),
        (lambda m: Sampling(top_k=0), "top_k"),
        (lambda m: Sampling(top_p=0.0), "top_p"),
        (lambda m: Sampling(min_new_tokens=-1), "min_new_tokens"),
        (lambda m: generate(m, [], plan=PLAN, max_new_tokens=1), "prompts"),
        (lambda m: generate(m, [[1], []], plan=PLAN, max_new_tokens=1), "prompts"),
        (lambda m: generate(m, [[1]], plan=PLAN, max_new_tokens=33), "max_new_tokens"),
        (lambda m: generate(m, [[1]], plan=PLAN, max_new_tokens=0), "max_new_tokens"),
        (lambda m: pad_prompts([[1] * 70], columns=64), "prompts"),
    ],
)
def test_bad_arguments_name_the_culprit(model, call, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        call(model)
