"""Gemma 3 270M, out of a quantised GGUF file, against its golden values."""

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits
from model_fixtures import FIXTURES

import models

LOGITS_MAX = 5e-3
# Golden margins below this may flip in another implementation.
CLEAR_MARGIN = 0.05
PROMPTS = ("short", "mid")


@pytest.fixture(scope="module")
def goldens():
    with np.load(FIXTURES / "gemma3/logits.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def lm():
    return models.load("gemma-3-270m")


@pytest.fixture(scope="module")
def runs(lm, goldens):
    """Per prompt: its length, and the logits of prompt and golden continuation, [T, V]."""
    found = {}
    for prompt in PROMPTS:
        ids = np.concatenate([goldens[f"{prompt}_ids"], goldens[f"{prompt}_greedy32"]])[None]
        logits = dense_logits(lm.model, ids, jnp.arange(ids.shape[1])[None])[0]
        found[prompt] = len(goldens[f"{prompt}_ids"]), np.asarray(logits)
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
def test_fixtures_logits(prompt, runs, goldens):
    length, logits = runs[prompt]
    last = logits[length - 8 : length]
    if f"{prompt}_logits_last2" in goldens:
        assert np.abs(last[-2:] - goldens[f"{prompt}_logits_last2"]).max() <= LOGITS_MAX
    if f"{prompt}_logits_last8_stride16" in goldens:
        every_16th = goldens[f"{prompt}_logits_last8_stride16"]
        assert np.abs(last[:, ::16] - every_16th).max() <= LOGITS_MAX
    top_ids, top = goldens[f"{prompt}_top20_ids_last8"], goldens[f"{prompt}_top20_logits_last8"]
    assert np.abs(np.take_along_axis(last, top_ids, axis=1) - top).max() <= LOGITS_MAX
    lse = np.logaddexp.reduce(last, axis=1)
    assert np.abs(lse - goldens[f"{prompt}_lse_last8"]).max() <= LOGITS_MAX
    clear = top[:, 0] - top[:, 1] > CLEAR_MARGIN
    assert clear.any()
    np.testing.assert_array_equal(last.argmax(axis=1)[clear], top_ids[clear, 0])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_fixtures_token_logprobs(prompt, runs, goldens):
    length, logits = runs[prompt]
    before = logits[: length - 1]
    next_ids = goldens[f"{prompt}_ids"][1:, None]
    logprobs = np.take_along_axis(before, next_ids, axis=1)[:, 0]
    logprobs = logprobs - np.logaddexp.reduce(before, axis=1)
    assert np.abs(logprobs - goldens[f"{prompt}_token_logprobs"]).max() <= LOGITS_MAX


@pytest.mark.parametrize("prompt", PROMPTS)
def test_fixtures_greedy(prompt, runs, goldens):
    length, logits = runs[prompt]
    close = np.flatnonzero(goldens[f"{prompt}_greedy32_margin"] < CLEAR_MARGIN)
    checked = close[0] if close.size else len(goldens[f"{prompt}_greedy32"])
    assert checked > 0
    greedy = logits[length - 1 : -1].argmax(axis=1)
    np.testing.assert_array_equal(greedy[:checked], goldens[f"{prompt}_greedy32"][:checked])


def test_description(lm):
    assert lm.tokenizer.vocab_size == lm.config.vocab_size
    assert lm.eos_ids == (1,)
    assert lm.tokenizer.add_bos
    assert lm.weights_bytes == 4 * 268_098_176
    assert [i for i, window in enumerate(lm.config.windows) if window is None] == [5, 11, 17]
    assert lm.config.windows[0] == 512
