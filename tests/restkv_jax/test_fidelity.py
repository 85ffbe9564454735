"""Measures of fidelity against dense attention, masks and NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Llama, ModelConfig
from models.rope import RopeConfig
from restkv_jax.decode import (
    AdaKV,
    CachePlan,
    Fidelity,
    Full,
    LayerSpec,
    RestKV,
    SnapKV,
    StagedLM,
    Streaming,
    init_cache,
    kl_divergence,
    layer_inputs,
    leave_one_out,
    measure_fidelity,
    pad_prompts,
    prefill,
    removal_changes,
    same_top1,
    with_output_factors,
)
from restkv_jax.leave_one_out import oracle_overlap
from tests.restkv_jax import dense, oracle, tiny

W, BUDGET, NEW = 4, 12, 6
LENGTHS = (40, 29)
PLANS = (
    CachePlan(policy=RestKV(window=W), budget=BUDGET, headroom=NEW),
    CachePlan(policy=SnapKV(window=W, granularity="query_head"), budget=BUDGET, headroom=NEW),
    CachePlan(policy=Streaming(), budget=BUDGET, headroom=NEW),
    CachePlan(policy=SnapKV(window=W), budget=BUDGET, heads=AdaKV(floor=0.0), headroom=NEW),
)
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    rms_eps=1e-5,
    rope=RopeConfig(),
    windows=(None, None),
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    tied_embeddings=True,
)
r = np.random.default_rng(0)
PROMPTS = [r.integers(0, 61, n).tolist() for n in LENGTHS]
CONTINUATION = r.integers(0, 61, (2, NEW)).astype(np.int32)
# The second row's continuation is shorter.
FOLLOWS = np.arange(NEW) < np.asarray([[NEW], [NEW - 2]])


@pytest.fixture(scope="module", params=["bare", "staged"])
def model(request):
    return tiny.make() if request.param == "bare" else Llama.init(CONFIG, seed=1)


@pytest.fixture(scope="module")
def measured(model):
    return measure_fidelity(
        with_output_factors(model),
        *pad_prompts(PROMPTS),
        CONTINUATION,
        FOLLOWS,
        plans=PLANS,
        oracle_window=W,
    )


def kept_by(model, plan, row):
    """Per layer and query head the positions of a row's prompt that a plan keeps."""
    _, (cache,) = prefill(model, *pad_prompts(PROMPTS), plans=(plan,))
    layers = []
    for layer, spec in enumerate(model.layer_specs):
        positions, owners = np.asarray(cache.kept_positions(layer))[row], cache.owners(layer)
        if owners is None:
            sets = list(positions)
        else:
            sets = [positions[0][np.asarray(owners)[row, 0] == j] for j in range(2)]
        group = spec.num_heads // len(sets)
        layers.append([kept[kept >= 0] for kept in sets for _ in range(group)])
    return layers


def mask(model, plan, row):
    """What each query head may see: of the prompt only what is kept, once it is over."""
    length, total = LENGTHS[row], LENGTHS[row] + int(FOLLOWS[row].sum())
    allowed = []
    for heads in kept_by(model, plan, row):
        seen = np.ones((len(heads), total, total), bool)
        for n, kept in enumerate(heads):
            seen[n, length:, np.setdiff1d(np.arange(length), kept)] = False
        allowed.append(jnp.asarray(seen)[None])
    return allowed


@jax.jit
def run(model, tokens, allowed):
    """Hidden states after each layer and of the end, q, k, v, w_o and outputs of each layer."""
    calls = []
    inner = dense.dense_attend(model, allowed)

    def attend(layer, q, k, v, w_o, state):
        out, state = inner(layer, q, k, v, w_o, state)
        calls.append((q[0], k[0], v[0], w_o))
        return out, state

    arguments = tokens, jnp.arange(tokens.shape[1])[None], attend, None
    if isinstance(model, StagedLM):
        stages = [hidden[0] for hidden, _ in model.stages(*arguments)]
    else:
        stages = [model(*arguments)[0][0]]
    return stages, calls, model.unembed(stages[-1])


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(a)


@pytest.mark.parametrize("index", range(len(PLANS)))
@pytest.mark.parametrize("row", [0, 1])
def test_every_error_is_that_of_dense_attention_under_a_mask(model, measured, index, row):
    count, length = int(FOLLOWS[row].sum()), LENGTHS[row]
    tokens = jnp.asarray([PROMPTS[row] + CONTINUATION[row, :count].tolist()])
    allowed = mask(model, PLANS[index], row)
    stages, calls, logits = jax.device_get(run(model, tokens, None))
    evicted_stages, _, evicted_logits = jax.device_get(run(model, tokens, allowed))
    ours = measured[index]

    hidden = [relative(a[length:], b[length:]) for a, b in zip(stages, evicted_stages, strict=True)]
    np.testing.assert_allclose(ours.hidden[row], hidden[-1], rtol=1e-4)
    if len(stages) > 1:
        np.testing.assert_allclose(ours.residual[row], hidden[:-1], rtol=1e-4)
    else:
        assert ours.residual is None

    p, q = (np.asarray(x[length:], np.float64) for x in (logits, evicted_logits))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(ours.kl[row, :count], kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(ours.top1[row, :count], p.argmax(-1) == q.argmax(-1))
    assert np.isnan(ours.kl[row, count:]).all()
    assert np.isnan(ours.top1[row, count:]).all()

    # Each layer by itself: the queries, keys and values of the full run, fewer keys.
    for layer, (q, k, v, w_o) in enumerate(calls):
        full, evicted = [], []
        for n in range(4):
            logit = 8**-0.5 * q[length:, n] @ k[:, n // 2].T
            logit[np.arange(length + count) > length + np.arange(count)[:, None]] = -np.inf
            for out, seen in ((full, None), (evicted, allowed[layer][0, n, length:])):
                masked = logit if seen is None else np.where(seen, logit, -np.inf)
                weights = np.exp(masked - masked.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out.append(weights @ v[:, n // 2] @ w_o[n])
            np.testing.assert_allclose(
                ours.attention_heads[row, layer, n], relative(full[n], evicted[n]), rtol=1e-4
            )
        np.testing.assert_allclose(
            ours.attention[row, layer], relative(sum(full), sum(evicted)), rtol=1e-4
        )


def test_nothing_evicted_is_no_error(model):
    plans = (
        CachePlan(policy=Full(), headroom=NEW),
        CachePlan(policy=RestKV(window=W), budget=40, headroom=NEW),
        CachePlan(policy=SnapKV(window=W), budget=40, heads=AdaKV(floor=1.0), headroom=NEW),
    )
    prompts = pad_prompts(PROMPTS)
    for found in measure_fidelity(model, *prompts, CONTINUATION, plans=plans, oracle_window=W):
        for values in (found.attention_heads, found.attention, found.hidden, found.kl):
            np.testing.assert_allclose(values, 0.0, atol=2e-6)
        assert found.residual is None or found.residual.max() < 2e-6
        np.testing.assert_array_equal(found.top1, 1.0)
        np.testing.assert_array_equal(found.overlap, 1.0)


def test_overlap_counts_the_past_that_the_oracle_keeps_too(model, measured):
    for index, (plan, found) in enumerate(zip(PLANS, measured, strict=True)):
        by = "query_head" if index == 1 else "kv_head"
        changes = leave_one_out(model, *pad_prompts(PROMPTS), window=W, granularity=by)
        sets = 4 if index == 1 else 2
        assert found.overlap.shape == (2, 2, sets)
        for row, length in enumerate(LENGTHS):
            for layer, heads in enumerate(kept_by(model, plan, row)):
                for j in range(sets):
                    past = [p for p in heads[j * 4 // sets] if p < length - W]
                    worth = np.asarray(changes[layer])[row, j, 64 - length : 64 - W]
                    best = oracle.top(worth, len(past))
                    share = len(set(best) & set(past)) / len(past)
                    assert found.overlap[row, layer, j] == pytest.approx(share, abs=1e-7)
    assert 0.0 < np.nanmean(measured[0].overlap) < 1.0


def test_overlap_by_hand():
    spec = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=1.0)
    specs = (spec, dataclasses.replace(spec, window=3))
    plan = CachePlan(policy=Streaming(sinks=1), budget=4, headroom=0)
    cache = init_cache(specs, plan, batch=1, prompt_columns=8, dtype=jnp.float32)
    positions = jnp.asarray([[[0, 1, 4, 5], [4, 5, -1, -1]]])
    stack = dataclasses.replace(cache.stacks[0], positions=positions)
    cache = dataclasses.replace(
        cache, stacks=(stack, cache.stacks[1]), next_position=jnp.asarray([6])
    )
    # Columns 2 to 7 are the positions 0 to 5; the window are the last two of them.
    change = np.asarray([[[9, 9, 1, 0, 3, 2, 8, 8], [9, 9, 1, 0, 3, 2, 8, 8]]], np.float32)
    first, ring = oracle_overlap(cache, specs, [change, change], 2)
    np.testing.assert_array_equal(first, [[0.0, np.nan]])  # {0, 1} against {2, 3}; nothing kept
    np.testing.assert_array_equal(ring, [[np.nan, np.nan]])


def numpy_changes(q, k, v, w_o, *, window, sets, scale, softcap=None, sliding=None):
    """Really deleting each key, of all query heads of its set."""
    heads, length = q.shape[0], k.shape[1]
    group, result = heads // k.shape[0], np.zeros((sets, length))
    for t in range(length - window, length):
        keys = [n for n in range(t + 1) if sliding is None or n > t - sliding]

        def output(h, keys, t=t):
            if not keys:
                return np.zeros(w_o.shape[-1])
            logits = scale * k[h // group, keys] @ q[h, t]
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            return weights / weights.sum() @ v[h // group, keys] @ w_o[h]

        for j in range(sets):
            members = range(j * heads // sets, (j + 1) * heads // sets)
            full = sum(output(h, keys) for h in members)
            for n in keys:
                rest = [key for key in keys if key != n]
                without = sum(output(h, rest) for h in members)
                result[j, n] += np.linalg.norm(full - without) / window
    return result


@pytest.mark.parametrize("sets", [2, 4])
@pytest.mark.parametrize(
    "kind", [{}, {"softcap": 2.0}, {"sliding_window": 5}, {"dominant": True}], ids=str
)
def test_brute_force_is_deleting_each_key(kind, sets):
    kind = dict(kind)
    draw = np.random.default_rng(4)
    length, window = 11, 3
    q, k, v, w_o = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in ((4, length, 8), (2, length, 8), (2, length, 8), (4, 8, 20))
    )
    if kind.pop("dominant", False):
        # A key with a weight of 1 to every digit: without it the others count, at full precision.
        q[:, -window:] += 3.0
        k[:, 2] += 20.0
    layer = layer_inputs(*(jnp.asarray(x)[None] for x in (q, k, v)), jnp.asarray(w_o), **kind)
    found = removal_changes(layer, window=window, sets=sets)
    expected = numpy_changes(
        *(x.astype(np.float64) for x in (q, k, v, w_o)),
        window=window,
        sets=sets,
        scale=8**-0.5,
        softcap=kind.get("softcap"),
        sliding=kind.get("sliding_window"),
    )
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=1e-6)
    assert np.isfinite(found).all()


def test_the_only_key_takes_the_whole_output_with_it():
    draw = np.random.default_rng(1)
    q, k, v = (jnp.asarray(draw.standard_normal((1, 2, 1, 8)), jnp.float32) for _ in range(3))
    w_o = jnp.asarray(draw.standard_normal((2, 8, 20)), jnp.float32)
    found = removal_changes(layer_inputs(q, k, v, w_o), window=1, sets=2)
    expected = jnp.linalg.norm(jnp.einsum("nh,nhd->nd", v[0, :, 0], w_o), axis=-1)
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-5)


def test_brute_force_of_a_model_knows_no_padding(model):
    rows = leave_one_out(model, *pad_prompts(PROMPTS), window=W)
    (alone,) = (leave_one_out(model, *pad_prompts([PROMPTS[1]], columns=29), window=W),)
    for ours, theirs in zip(rows, alone, strict=True):
        np.testing.assert_allclose(ours[1, :, 64 - 29 :], theirs[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(ours[1, :, : 64 - 29], 0.0)


def test_kl_and_top1_of_known_distributions():
    p, q = np.asarray([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]), np.asarray([[0.1, 0.2, 0.7]] * 2)
    found = kl_divergence(jnp.log(jnp.asarray(p)) + 3.0, jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert same_top1(jnp.asarray(p), jnp.asarray(p[::-1])).tolist() == [True, True]
    assert same_top1(jnp.asarray(p), jnp.asarray(q)).tolist() == [False, False]


def test_summaries_leave_out_what_is_not_there(measured):
    found = measured[0]
    summary = found.summary()
    assert summary["kl"] == pytest.approx(np.nanmean(found.kl))
    assert summary["largest_kl"] == pytest.approx(np.nanmax(found.kl))
    assert summary["attention"] == pytest.approx(found.attention.mean())
    assert np.isnan(summary["residual"]) == (found.residual is None)
    both = Fidelity.concatenate([found, found])
    assert both.kl.shape == (4, NEW)
    assert both.summary() == pytest.approx(summary, nan_ok=True)


def test_bad_input_is_named(model):
    prompts = pad_prompts(PROMPTS)
    with pytest.raises(ValueError, match="continuation: expected at least 1 token"):
        measure_fidelity(model, *prompts, CONTINUATION[:, :0], plans=PLANS)
    short = CachePlan(policy=SnapKV(window=W), budget=BUDGET, headroom=2)
    with pytest.raises(ValueError, match=f"plan 1 has room for 2 tokens, the continuation {NEW}"):
        measure_fidelity(model, *prompts, CONTINUATION, plans=(PLANS[0], short))
    with pytest.raises(ValueError, match="oracle_window: expected at least 1 query, got 0"):
        measure_fidelity(model, *prompts, CONTINUATION, plans=PLANS, oracle_window=0)


def test_positions_by_slot_leave_the_layers_own_errors_out():
    """The full cache's queries stand at other positions than such a cache's keys."""
    plan = CachePlan(policy=Streaming(), budget=BUDGET, rope="slot", headroom=NEW)
    model, prompts = Llama.init(CONFIG, seed=1), pad_prompts(PROMPTS)
    (found,) = measure_fidelity(model, *prompts, CONTINUATION, plans=(plan,), oracle_window=None)
    assert np.isnan(found.attention).all()
    assert np.isnan(found.attention_heads).all()
    assert np.isnan(found.overlap).all()
    assert (found.kl > 0.0).all()
    assert (found.residual > 0.0).all()
