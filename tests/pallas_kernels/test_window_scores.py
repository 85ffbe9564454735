"""`window_scores`: kernels in interpret mode against the reference, and where float32 is weak."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels.window_scores as package
from pallas_kernels.window_scores import ScoreForm, Tiling, window_scores
from pallas_kernels.window_scores.kernel_tpu import window_scores as by_tpu
from pallas_kernels.window_scores.reference import window_scores as by_reference
from pallas_kernels.window_scores.specs import SPECS
from restkv_jax.compression import score
from restkv_jax.layer import LayerInputs, Probe
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import RestKV, SnapKV
from restkv_jax.prompt_attention import causal_attention
from tests.pallas_kernels.lowering import lowered

SMALL = [spec for spec in SPECS if not spec.large]
NAMED = {spec.name: spec for spec in SPECS}
TILING = Tiling(keys=128)
# The programs are run once: most of the time would go into making them fast.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def compare(spec, dtype, *, interpret=True):
    """The kernel's scores and the reference's; NaN stands where the kernel sees no key."""
    q, k, v, factor, mean, queries, places = spec.inputs(dtype)
    unused = (jnp.broadcast_to(places, k.shape[:3]) < 0)[..., None]
    poisoned = (jnp.where(unused, jnp.nan, x).astype(dtype) for x in (k, v))
    run = quick_jit(functools.partial(by_tpu, form=spec.form, tiling=TILING, interpret=interpret))
    ours = run(q, *poisoned, factor, mean, queries, places, None)
    ref = quick_jit(functools.partial(by_reference, form=spec.form))
    return np.asarray(ours), np.asarray(ref(q, k, v, factor, mean, queries, places))


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_tpu_kernel_equals_the_reference(spec):
    ours, theirs = compare(spec, jnp.float32)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_tpu_kernel_equals_the_reference_in_bfloat16(spec):
    """Inputs are rounded, nothing else is: the same tolerance but for the order of sums."""
    ours, theirs = compare(spec, jnp.bfloat16)
    np.testing.assert_allclose(ours, theirs, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gqa3_80", "max_64", "attention"])
def test_tpu_kernel_has_no_races_and_reads_no_uninitialised_memory(name, simulator):
    ours, theirs = compare(NAMED[name], jnp.float32, interpret=simulator)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


HEADS, WINDOW, COLUMNS, SIZE = 2, 3, 140, 16


def heavy_attention(rest):
    """q and k whose last two rows leave about `rest` to all keys but number 5, the first to 7."""
    r = np.random.default_rng(0)
    k = 0.1 * r.standard_normal((1, 1, COLUMNS, SIZE)).astype(np.float32)
    k[..., :2] = 0.0
    k[0, 0, 5, 0] = k[0, 0, 7, 1] = 1.0
    q = np.zeros((1, HEADS, WINDOW, SIZE), np.float32)
    q[..., 2:] = r.standard_normal((1, HEADS, WINDOW, SIZE - 2))
    peak = np.log(COLUMNS / rest)
    q[:, :, 1:, 0], q[:, :, 0, 1] = peak, peak
    v = r.standard_normal((1, 1, COLUMNS, SIZE)).astype(np.float32)
    factor = r.standard_normal((HEADS, SIZE, SIZE)).astype(np.float32)
    return q, k, v, factor


def scores_in_float64(kind, q, k, v, factor, mean):
    """By the equations; 1 - A is a sum over the other keys."""
    q, k, v, factor, w = (np.asarray(x, np.float64) for x in (q, k, v, factor, mean))
    past = COLUMNS - WINDOW
    logits = q @ k[:, :1].swapaxes(-1, -2)
    logits[..., np.arange(COLUMNS) > past + np.arange(WINDOW)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    others = [np.delete(weights, n, -1).sum(-1) for n in range(COLUMNS)]
    total = weights.sum(-1)
    weights, left = weights / total[..., None], np.stack(others, -1) / total[..., None]
    values = v[:, 0]
    w = w / w.sum()  # float32 misses 1 by more than what is left at the sharpest
    if kind == "aggregated":
        weights, left = (np.einsum("bnwt,w->bnt", x, w)[:, :, None] for x in (weights, left))
        output = weights[..., :past] @ values[:, :past]
    else:
        output = weights @ values
    gap = np.einsum("bnwth,nhr->bnwtr", output[..., None, :] - values, factor)
    scores = (weights / left * np.linalg.norm(gap, axis=-1))[..., :past]
    return scores[:, :, 0] if kind == "aggregated" else np.einsum("bnwt,w->bnt", scores, w)


def heavy_case(kind, rest):
    """Arguments, form and the exact scores."""
    arrays = heavy_attention(rest)
    # The first row looks elsewhere, with as little weight as the others leave.
    mean = np.asarray([rest, 0.4, 0.6 - rest], np.float32)
    past = COLUMNS - WINDOW
    places = (past + np.arange(WINDOW))[None], np.arange(COLUMNS)[None, None]
    form = ScoreForm(kind=kind, past=past, scale=1.0)
    expected = scores_in_float64(kind, *arrays, mean)
    return tuple(map(jnp.asarray, (*arrays, mean, *places))), form, expected


@pytest.mark.parametrize("rest", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("kind", ["aggregated", "per_query"])
def test_a_key_with_nearly_all_weight_keeps_its_score(kind, rest):
    args, form, expected = heavy_case(kind, rest)
    run = quick_jit(functools.partial(by_tpu, form=form, tiling=TILING, interpret=True))
    ours = run(*args, None)
    assert (np.argmax(ours, -1) == 5).all()
    np.testing.assert_allclose(ours, expected, rtol=3e-5)


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "tpu"])
def test_queries_before_the_start_of_a_prompt_are_part_of_the_average(kernel):
    """They attend to nothing, so that the average sums to less than 1; 1 - ā is as the equation."""
    r = np.random.default_rng(4)
    q, k, v, factor = r.standard_normal((4, 1, 2, 14, SIZE)).astype(np.float32)
    q, mean = 3 * q[:, :, :4], np.float32([0.1, 0.2, 0.3, 0.4])
    factor = np.swapaxes(factor[0], 1, 2)  # [N, H, R], R = 14
    queries, places = np.arange(-1, 3)[None], np.arange(-11, 3)[None, None]
    form = ScoreForm(kind="aggregated", past=13, scale=1.0)
    expected = np.zeros((1, 2, 13))
    for head in range(2):
        logits = q[0, head, 1:].astype(float) @ k[0, head, 11:].T
        logits[np.triu_indices(3, 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        a = mean[1:] @ (weights / weights.sum(-1, keepdims=True))[:, :2]
        values = v[0, head, 11:13].astype(float)
        distance = np.linalg.norm((a @ values - values) @ factor[head], axis=-1)
        expected[0, head, 11:] = a / (1 - a) * distance
    run = functools.partial(by_tpu, tiling=TILING, interpret=True) if kernel else by_reference
    args = map(jnp.asarray, (q, k, v, factor, mean, queries, places))
    np.testing.assert_allclose(run(*args, None, form=form), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["aggregated", "per_query"])
def test_derivatives(kind):
    """Along a direction, against differences of the equations in float64."""
    (q, k, v, factor, mean, *places), form, _ = heavy_case(kind, 1e-2)
    r = np.random.default_rng(1)
    toward, of = r.standard_normal((1, HEADS, COLUMNS - WINDOW)), (q, k, v)
    steps = [r.standard_normal(x.shape) for x in of]

    def along(q, k, v):
        return jnp.vdot(toward, window_scores(q, k, v, factor, mean, *places, form=form))

    def at(h):
        moved = (np.asarray(x, np.float64) + h * step for x, step in zip(of, steps, strict=True))
        return np.vdot(toward, scores_in_float64(kind, *moved, factor, mean))

    slopes = jax.jit(jax.grad(along, (0, 1, 2)))(*of)
    ours = sum(np.vdot(x, step) for x, step in zip(slopes, steps, strict=True))
    np.testing.assert_allclose(ours, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("peak", [0.0, 30.0, 300.0])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "aggregated"},
        {"kind": "per_query"},
        {"kind": "per_query", "relative": True},
        {"kind": "per_query", "power": 2.0},
    ],
    ids=str,
)
def test_derivatives_are_finite(options, peak):
    """One key has all of the weight, a row holds two keys only, all values are the same."""
    q, k, v, factor = map(jnp.asarray, heavy_attention(1e-2))
    q = q.at[:, :, 1:, 0].set(peak)
    mean, past = jnp.full(WINDOW, 1 / WINDOW), COLUMNS - WINDOW
    form = ScoreForm(past=past, scale=1.0, **options)
    queries, places = past + jnp.arange(WINDOW)[None], jnp.arange(COLUMNS)[None, None]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def slopes(q, k, v, factor, queries, places):
        return jnp.sum(window_scores(q, k, v, factor, mean, queries, places, form=form))

    short = COLUMNS - 2
    two = jnp.where(queries < short, -1, queries), jnp.where(places < short, -1, places)
    cases = (v, queries, places), (v, *two), (jnp.ones_like(v), queries, places)
    for v, queries, places in cases:
        found = slopes(q, k, v, factor, queries, places)
        assert all(np.isfinite(x).all() for x in found)


def arrays(length, dtype=np.float32):
    r = np.random.default_rng(length)
    shapes = (2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 16), (4, 16, 40)
    return [jnp.asarray(r.standard_normal(shape), dtype) for shape in shapes]


def prompt():
    q, k, v, w_o = arrays(60)
    layer = layer_inputs(
        q, k, v, w_o, lengths=jnp.asarray([60, 35]), softcap=5.0, sliding_window=40
    )
    log_sums = causal_attention(q, k, v, layer.lengths, spec=layer.spec)[1]
    return LayerInputs(**{**vars_of(layer), "log_sums": log_sums})


def probed():
    q, k, v, w_o = arrays(60)
    probe = Probe(q=q[:, :, :6], k=k[:, :, :6] + 1, v=v[:, :, :6] + 1)
    return layer_inputs(q, k, v, w_o, lengths=jnp.asarray([60, 35]), probe=probe)


def cached():
    q, k, v, w_o = arrays(60)
    layer = layer_inputs(q[:, :, -8:], k, v, w_o, lengths=jnp.asarray([90, 61]))
    r = np.random.default_rng(0)
    places = np.stack(
        [[np.sort(r.choice(n, 60, replace=False)) for _ in range(2)] for n in (90, 61)]
    )
    places = np.where(np.arange(60) < 9, -1, places)
    return LayerInputs(**{**vars_of(layer), "cached_positions": jnp.asarray(places)})


def vars_of(layer):
    return {name: getattr(layer, name) for name in layer.__dataclass_fields__}


@pytest.mark.parametrize("make", [prompt, probed, cached])
@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(window=8, granularity="query_head"),
        RestKV(window=8, recent=4, tau=2.0),
        RestKV.paper(window=8, relative=True, spatial="none"),
    ],
    ids=lambda policy: f"{policy.name}-{getattr(policy, 'form', '')}",
)
def test_policies_hand_the_kernel_what_they_hand_the_reference(policy, make, monkeypatch):
    layer = make()
    expected = score(policy, layer, capacity=20)
    calls = []

    def run_kernel(op, implementation, *args, reference, kernels):
        *inputs, _, log_sums = args
        form = calls.append(kernels) or form_of(kernels)
        run = functools.partial(by_tpu, form=form, tiling=TILING, interpret=True)
        return quick_jit(run)(*inputs, log_sums)

    monkeypatch.setattr(package, "dispatch", run_kernel)
    ours = score(policy, make(), capacity=20)
    assert len(calls) == 1
    np.testing.assert_allclose(ours, expected, rtol=3e-5, atol=1e-6)


def form_of(kernels):
    (kernel,) = (kernel for kernel in kernels if kernel.name == "pallas_tpu")
    assert kernel.refusal is None
    return kernel.run.keywords["form"]


def test_heads_and_rows_split_over_devices():
    spec = NAMED["gqa4_96"]
    q, k, v, factor, mean, queries, places = spec.inputs(jnp.float32)
    k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    q, factor = jnp.repeat(q, 2, axis=1), jnp.repeat(factor, 2, axis=0)
    args = q, k, v, factor, mean, queries, places
    run = functools.partial(by_tpu, log_sums=None, form=spec.form, tiling=TILING, interpret=True)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    both, heads, rows = P("data", "model"), P("model"), P("data")
    specs = (both, both, both, heads, P(), rows, rows)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=both, check_vma=False)
    np.testing.assert_allclose(
        quick_jit(split)(*args), by_reference(*args, form=spec.form), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", ["attention", "aggregated", "per_query"])
def test_the_kernels_are_lowered_for_tpu_and_the_reference_for_cpu(kind):
    spec = NAMED["gqa8_128"]
    form = ScoreForm(kind=kind, past=100, scale=1.0)
    op = functools.partial(window_scores, form=form)
    args = spec.inputs(jnp.bfloat16)
    text = lowered(op, *args)
    assert f"window_scores_{kind}" in text
    assert text.count("tpu_custom_call") == 2
    assert "custom_call" not in jax.jit(op).lower(*args).as_text()


def test_known_sums_spare_the_first_pass():
    spec = NAMED["attention"]
    args = spec.inputs(jnp.bfloat16)
    sums = jnp.zeros(args[0].shape[:3])

    def op(*args):
        return window_scores(*args[:-1], log_sums=args[-1], form=spec.form)

    assert lowered(op, *args, sums).count("tpu_custom_call") == 1


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_shapes_are_those_of_the_inputs(spec):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), spec.shapes(jnp.bfloat16))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), spec.inputs(jnp.bfloat16))


def test_no_kernel_is_named_in_vain():
    spec = NAMED["attention"]
    args = spec.inputs(jnp.float16)
    with pytest.raises(NotImplementedError, match=r"window_scores.*float16"):
        window_scores(*args, form=spec.form, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"form": {"past": 999}}, "form.past"),
        ({"form": {"kind": "median"}}, "kind"),
        ({"form": {"power": 2.0}}, "relative, power"),
        ({"form": {"kind": "per_query", "tau": 2.0}}, "tau"),
        ({"v": None}, "v"),
        ({"factor": None}, "factor"),
        ({"row_weights": None}, "row_weights"),
        ({"query_positions": jnp.zeros((2, 1), int)}, "query_positions"),
        ({"key_positions": jnp.zeros((2, 5, 300), int)}, "key_positions"),
        ({"k": jnp.zeros((2, 2, 300, 32))}, "q, k"),
    ],
)
def test_bad_arguments_name_the_culprit(change, culprit):
    names = ("q", "k", "v", "factor", "row_weights", "query_positions", "key_positions")
    args = dict(zip(names, NAMED["mha_64"].inputs(jnp.float32), strict=True))
    form = {"kind": "aggregated", "past": 200, "scale": 1.0, **change.pop("form", {})}
    with pytest.raises(ValueError, match=rf"^{culprit}\b"):
        window_scores(**{**args, **change}, form=ScoreForm(**form))
