"""Every architecture under every policy: decoding from the evicted cache is masked attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import checkpoints

import models
from restkv_jax.decode import (
    CachePlan,
    Full,
    RestKV,
    SnapKV,
    Streaming,
    decode_step,
    pad_prompts,
    prefill,
)
from tests.restkv_jax.dense import dense_attend

W, BUDGET, HEADROOM = 8, 16, 8
LENGTHS = (50, 37)
NEW = 4
POLICIES = {
    "full": Full(),
    "streaming": Streaming(),
    **{
        f"{name}-{granularity}": make(window=W, granularity=granularity)
        for name, make in (
            ("snapkv", SnapKV),
            ("restkv-released", RestKV.released),
            ("restkv-paper", RestKV.paper),
        )
        for granularity in ("kv_head", "query_head")
    },
}
PLANS = tuple(
    CachePlan(policy=policy, budget=BUDGET if policy.needs_budget else None, headroom=HEADROOM)
    for policy in POLICIES.values()
)
LOGITS_MAX = 5e-4
STEP = jax.jit(decode_step)


@jax.jit
def masked_logits(model, tokens, allowed):
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = model(tokens[None], positions, dense_attend(model, allowed), None)
    return model.unembed(hidden)[0]


@pytest.fixture(scope="module", params=checkpoints("hf_tiny/*", wants="goldens.npz"))
def case(request):
    """A model, a ragged batch, and the logits and caches of one prefill under all plans."""
    with np.load(request.param / "goldens.npz") as goldens:
        prompts = [goldens["input_ids"][row, :length] for row, length in enumerate(LENGTHS)]
        new = goldens["input_ids"][:, -NEW:]
    model = models.load(request.param).model
    logits, caches = prefill(model, *pad_prompts(prompts), plans=PLANS)
    return model, prompts, new, logits, dict(zip(POLICIES, caches, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_fixtures_decoding_sees_what_was_kept(case, policy):
    model, prompts, new, prefilled, caches = case
    cache = caches[policy]
    expected = []
    for row, prompt in enumerate(prompts):
        tokens = np.concatenate([prompt, new[row]])
        allowed = tuple(
            jnp.asarray(_allowed(cache, model.layer_specs, layer, row, len(prompt), len(tokens)))
            for layer in range(len(model.layer_specs))
        )
        logits = masked_logits(model, jnp.asarray(tokens), allowed)
        np.testing.assert_allclose(prefilled[row], logits[len(prompt) - 1], atol=LOGITS_MAX)
        expected.append(np.asarray(logits[len(prompt) :]))
    for step in range(NEW):
        logits, cache = STEP(model, cache, jnp.asarray(new[:, step]), jnp.ones(2, bool))
        for row in range(2):
            np.testing.assert_allclose(logits[row], expected[row][step], atol=LOGITS_MAX)


def _allowed(cache, specs, layer, row, length, total):
    """[1, N, T, T]: new tokens see what is kept; the window's own mask comes on top."""
    spec = specs[layer]
    mask = np.ones((spec.num_heads, total, total), bool)
    kept = np.asarray(cache.kept_positions(layer))[row]
    if spec.window is None:
        for head in range(spec.num_heads):
            own = kept[head * kept.shape[0] // spec.num_heads]
            mask[head, length:, np.setdiff1d(np.arange(length), own)] = False
    else:
        first = max(length - spec.window, 0)
        for own in kept:
            np.testing.assert_array_equal(np.sort(own[own >= 0]), np.arange(first, length))
    return mask[None]
