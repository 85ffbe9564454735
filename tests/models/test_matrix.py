"""Every architecture under every policy: decoding from the evicted cache is masked attention."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import checkpoints
from programs import quickly

import models
from models.families import FAMILIES
from models.registry import NETWORKS
from restkv_jax.decode import POLICIES, CachePlan, decode_step, pad_prompts, prefill
from restkv_jax.policies import PRESETS, LaCache
from tests.models.layers_of import with_layers
from tests.restkv_jax.dense import dense_attend

W, BUDGET, HEADROOM = 8, 24, 8
LENGTHS = (50, 37)
NEW = 4
COLUMNS = max(LENGTHS) + NEW
LOGITS_MAX = 2e-4


def settings():
    """Every policy in every granularity that it has, and every preset; small windows."""
    found = {}
    for name, policy in POLICIES.items():
        options = [{}]
        fields = {field.name for field in dataclasses.fields(policy)}
        if "granularity" in fields:
            options = [{"granularity": value} for value in ("kv_head", "query_head")]
        for option in options:
            window = {"window": W} if "window" in fields else {}
            if policy is LaCache:
                window = {"span": 1}  # below the number of layers here
            for preset, make in {"": policy, **PRESETS.get(name, {})}.items():
                label = "-".join(filter(None, (name, preset, *option.values())))
                found.setdefault(make(**window, **option), label)  # a preset may be the default
    return {label: setting for setting, label in found.items()}


SETTINGS = settings()
PLANS = tuple(
    CachePlan(policy=policy, budget=BUDGET if policy.needs_budget else None, headroom=HEADROOM)
    for policy in SETTINGS.values()
)


def masked_logits(model, tokens, allowed):
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = model(tokens[None], positions, dense_attend(model, allowed), None)
    return model.unembed(hidden)[0]


def shallow(model):
    """The model with two of its layers, one of each kind if it has two kinds."""
    windows = model.config.windows
    kinds = list(dict.fromkeys(windows))
    return with_layers(model, [windows.index(kind) for kind in kinds] if len(kinds) > 1 else [0, 1])


SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}
OWN_SIZES = {
    "Qwen3ForCausalLM": {"head_dim": 16},
    "GemmaForCausalLM": {"head_dim": 16, "num_key_value_heads": 1},
    "Gemma2ForCausalLM": {"head_dim": 16, "attn_logit_softcapping": 2.0},
    "Gemma3ForCausalLM": {"head_dim": 16},
}


def cases():
    """The checkpoints, and a random model of each architecture that none of them has."""
    found = checkpoints("hf_tiny/*", wants="goldens.npz")
    configs = [json.loads((p.values[0] / "config.json").read_text()) for p in found]
    seen = {name for config in configs for name in config["architectures"]}
    for name in sorted(set(FAMILIES) - seen):
        config = {"architectures": [name]} | SIZES | OWN_SIZES.get(name, {})
        configs.append(config)
        found.append(pytest.param(config, id=f"random-{name}"))
    return found, [models.ModelConfig.from_hf(config) for config in configs]


CASES, CONFIGS = cases()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model, a ragged batch, logits and caches of one prefill under all plans, and programs."""
    if isinstance(request.param, dict):
        config = models.ModelConfig.from_hf(request.param)
        model = NETWORKS[config.architecture].init(config, seed=1)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 96), np.int32)
    else:
        model = shallow(models.load(request.param).model)
        with np.load(request.param / "goldens.npz") as goldens:
            ids = goldens["input_ids"]
    prompts = [ids[row, :length] for row, length in enumerate(LENGTHS)]
    new = ids[:, -NEW:]
    logits, caches = quickly(prefill, plans=PLANS)(model, *pad_prompts(prompts))
    caches = dict(zip(SETTINGS, caches, strict=True))
    return model, prompts, new, logits, caches, quickly(decode_step), quickly(masked_logits)


def test_every_policy_is_here():
    assert {policy.name for policy in SETTINGS.values()} == set(POLICIES)
    for name in ("snapkv", "restkv", "expected_attention", "ablation"):
        assert f"{name}-kv_head" in SETTINGS
        assert f"{name}-query_head" in SETTINGS


def test_every_kind_of_architecture_is_here():
    """With global layers, where policies act."""
    assert {config.architecture for config in CONFIGS} == set(FAMILIES)
    acting = [config for config in CONFIGS if None in config.windows]
    for has in (
        lambda config: config.head_dim != config.hidden_size // config.num_heads,
        lambda config: config.num_kv_heads == 1,
        lambda config: config.attn_softcap is not None,
        lambda config: config.qk_norm,
        lambda config: config.qkv_bias,
        lambda config: len(set(config.windows)) == 2,
    ):
        assert any(map(has, acting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_fixtures_decoding_sees_what_was_kept(case, setting):
    model, prompts, new, prefilled, caches, step_on, masked = case
    cache = caches[setting]
    expected = []
    for row, prompt in enumerate(prompts):
        # Padded behind the text, which is not seen from it: one program serves both rows.
        tokens = np.zeros(COLUMNS, np.int32)
        tokens[: len(prompt) + NEW] = np.concatenate([prompt, new[row]])
        allowed = tuple(
            jnp.asarray(_allowed(cache, model.layer_specs, layer, row, len(prompt), COLUMNS))
            for layer in range(len(model.layer_specs))
        )
        logits = masked(model, tokens, allowed)
        np.testing.assert_allclose(prefilled[row], logits[len(prompt) - 1], atol=LOGITS_MAX)
        expected.append(np.asarray(logits[len(prompt) : len(prompt) + NEW]))
    for step in range(NEW):
        logits, cache = step_on(model, cache, new[:, step], jnp.ones(2, bool))
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
            assert (own >= 0).sum() <= BUDGET or cache.slots(layer) > BUDGET + HEADROOM
            mask[head, length:, np.setdiff1d(np.arange(length), own)] = False
    else:
        first = max(length - spec.window, 0)
        for own in kept:
            np.testing.assert_array_equal(np.sort(own[own >= 0]), np.arange(first, length))
    return mask[None]
