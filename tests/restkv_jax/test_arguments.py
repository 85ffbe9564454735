"""Bad input: an error that names the argument, what was expected and what came."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import (
    CachePlan,
    Full,
    SnapKV,
    decode_step,
    extend,
    join_rows,
    pad_prompts,
    prefill,
    prefill_bounded,
    score_tokens,
)
from tests.restkv_jax import tiny

PLAN = CachePlan(policy=Full(), headroom=8)


@pytest.fixture(scope="module")
def prefilled():
    """A model, the logits that follow a prompt, and the prompt's cache."""
    model = tiny.make()
    logits, (cache,) = prefill(model, *pad_prompts([[3, 1, 4, 1, 5]]), plans=(PLAN,))
    return model, logits, cache


def test_tokens_of_more_or_fewer_rows_than_the_cache_are_refused(prefilled):
    model, logits, cache = prefilled
    asked = jnp.ones((2, 3), jnp.int32)
    expected = r"^tokens: expected 1 row\(s\), .* got 2; .*join_rows\(\[cache\] \* n\)"
    with pytest.raises(ValueError, match=expected):
        extend(model, cache, asked)
    with pytest.raises(ValueError, match=expected):
        score_tokens(model, jnp.tile(logits, (2, 1)), cache, asked)
    with pytest.raises(ValueError, match=expected):
        decode_step(model, cache, asked[:, 0], jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"^tokens: expected 2 row\(s\), .* got 1"):
        extend(model, join_rows([cache] * 2), asked[:1])


@pytest.mark.parametrize(
    ("tokens", "valid", "culprit"),
    [
        (np.ones((1, 8), int), np.ones((1, 6), bool), "valid"),
        (np.ones((1, 8), int), np.ones(8, bool), "valid"),
        (np.ones((1, 8)), np.ones((1, 8), bool), "tokens"),
        (np.ones(8, int), np.ones(8, bool), "tokens"),
        (np.ones((1, 0), int), np.ones((1, 0), bool), "tokens"),
    ],
    ids=["short mask", "flat mask", "floats", "flat tokens", "none"],
)
def test_tokens_and_masks_that_do_not_fit_are_refused(prefilled, tokens, valid, culprit):
    model, logits, cache = prefilled
    bounded = CachePlan(policy=SnapKV(window=4), budget=12)
    for call in (
        lambda: prefill(model, tokens, valid, plans=(PLAN,)),
        lambda: prefill_bounded(model, tokens, valid, plan=bounded, piece=8),
        lambda: extend(model, cache, tokens, valid),
        lambda: score_tokens(model, logits, cache, tokens, valid),
    ):
        with pytest.raises(ValueError, match=rf"^{culprit}: expected"):
            call()
