"""Real models, out of quantised GGUF files, against their golden values."""

import numpy as np
import pytest
from dense_attend import dense_logits
from model_fixtures import FIXTURES

import models
from restkv_jax.decode import CachePlan, Full, RestKV, pad_prompts, prefill
from restkv_jax.generate import continue_from

LOGITS_MAX = 5e-3
# Golden margins below this may flip in another implementation.
CLEAR_MARGIN = 0.05
PROMPTS = ("short", "mid")


# Folder of goldens -> name of the model.
PACKAGED = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma-3-270m"}


@pytest.fixture(scope="module", params=PACKAGED)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def goldens(folder):
    with np.load(FIXTURES / folder / "logits.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def lm(folder):
    return models.load(PACKAGED[folder])


@pytest.fixture(scope="module")
def runs(lm, goldens):
    """Per prompt: its length, and the logits of prompt and golden continuation, [T, V]."""
    texts = [np.r_[goldens[f"{prompt}_ids"], goldens[f"{prompt}_greedy32"]] for prompt in PROMPTS]
    columns, found = max(map(len, texts)), {}
    for prompt, ids in zip(PROMPTS, texts, strict=True):
        # Padded behind the text: one program serves both.
        padding = (0, columns - len(ids))
        positions = np.pad(np.arange(len(ids)), padding, constant_values=-1)
        logits = dense_logits(lm.model, np.pad(ids, padding)[None], positions[None])[0]
        found[prompt] = len(goldens[f"{prompt}_ids"]), np.asarray(logits[: len(ids)])
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
def test_fixtures_logits(prompt, runs, goldens):
    length, logits = runs[prompt]
    last = logits[length - 8 : length]
    stored = {"last8": np.s_[:], "last2": np.s_[-2:], "last8_stride16": np.s_[:, ::16]}
    for key, part in stored.items():
        if f"{prompt}_logits_{key}" in goldens:
            expected = goldens[f"{prompt}_logits_{key}"]
            assert np.abs(last[part] - expected).max() <= LOGITS_MAX
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


def test_fixtures_greedy_from_a_cache(lm, goldens):
    """One prefill, and a decode chunk for each cache; the budget holds the prompt."""
    plans = (
        CachePlan(policy=Full(), headroom=32),
        CachePlan(policy=RestKV(), budget=384, headroom=32),
    )
    expected = goldens["mid_greedy32"]
    close = np.flatnonzero(goldens["mid_greedy32_margin"] < CLEAR_MARGIN)
    checked = close[0] if close.size else len(expected)
    assert checked > 0
    logits, caches = prefill(lm.model, *pad_prompts([goldens["mid_ids"]]), plans=plans)
    for cache in caches:
        out = continue_from(lm.model, logits, cache, headroom=32, max_new_tokens=32, chunk=31)
        np.testing.assert_array_equal(out.tokens[0, :checked], expected[:checked])


def test_description(lm, folder):
    tokenizer, config = lm.tokenizer, lm.config
    assert lm.name == PACKAGED[folder]
    assert tokenizer.vocab_size == config.vocab_size
    if folder == "smollm2":
        assert lm.eos_ids == lm.turn_end_ids == tuple(tokenizer.encode("<|im_end|>"))
        assert not tokenizer.add_bos
        assert lm.weights_bytes == 4 * 134_515_008
    else:
        assert lm.eos_ids == (1,)
        assert tokenizer.add_bos
        assert lm.weights_bytes == 4 * 268_098_176
        assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17]
        assert config.windows[0] == 512
