"""`masked_eviction`: the kernels against a stable sort, and what moves is not changed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import restkv_jax.compression as compression
from pallas_kernels.masked_eviction import kernel_tpu, masked_eviction
from pallas_kernels.masked_eviction.kernel_tpu import masked_eviction as by_tpu
from pallas_kernels.masked_eviction.specs import SPECS
from pallas_kernels.quantized import QuantArray
from pallas_kernels.triton_extra import without_triton
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import H2O, POLICIES, KeyDiff, RestKV, SnapKV, Streaming
from tests.pallas_kernels.lowering import GPU, lowered

SMALL = [spec for spec in SPECS if not spec.large]
NAMED = {spec.name: spec for spec in SPECS}
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def check(spec, dtype, run):
    """Entry by entry against a stable sort; NaN stands in what may not be taken."""
    importance, k, v, places, budget = spec.inputs(dtype)
    shared = spec.sets // spec.kv_heads
    empty = np.all(np.asarray(importance).reshape(spec.batch, -1, shared, spec.columns) < -9, 2)

    def poisoned(x):
        if isinstance(x, QuantArray):
            return QuantArray(values=x.values, scale=jnp.where(empty, jnp.nan, x.scale))
        return jnp.where(empty[..., None], jnp.nan, x)

    ours = run(importance, poisoned(k), poisoned(v), places, budget)
    for b in range(spec.batch):
        for j in range(spec.sets):
            row = np.asarray(importance[b, j])
            best = [i for i in np.argsort(-row, kind="stable") if row[i] > -np.inf]
            stay = np.sort(best[: int(budget[b])]).astype(int)
            n = len(stay)
            np.testing.assert_array_equal(ours.columns[b, j, :n], stay)
            np.testing.assert_array_equal(ours.positions[b, j, :n], places[b, j // shared, stay])
            assert (np.asarray(ours.columns[b, j, n:]) == -1).all()
            assert (np.asarray(ours.positions[b, j, n:]) == -1).all()
            for new, old in zip(
                jax.tree.leaves((ours.k, ours.v)), jax.tree.leaves((k, v)), strict=True
            ):
                assert new.dtype == old.dtype
                new, old = np.asarray(new[b, j]), np.asarray(old[b, j // shared])
                np.testing.assert_array_equal(new[:n], old[stay])
                assert (new[n:] == 0).all()


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_reference_is_a_stable_sort(spec):
    check(spec, jnp.float32, functools.partial(masked_eviction, **spec.options))


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_kernel_is_a_stable_sort(spec, dtype):
    check(spec, dtype, quick_jit(functools.partial(by_tpu, **spec.options, interpret=True)))


@pytest.mark.parametrize("name", ["by_head", "decode_int8"])
def test_tpu_kernel_has_no_races_and_reads_no_uninitialised_memory(name, simulator):
    run = functools.partial(by_tpu, **NAMED[name].options, interpret=simulator)
    check(NAMED[name], jnp.bfloat16, quick_jit(run))


_ROW = functools.partial(jax.jit, static_argnames="capacity")(
    functools.partial(by_tpu, interpret=True)
)


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(
        st.sampled_from([0.0, -0.0, 2e-38, 1.0, -1.0, 3.5, np.inf, -np.inf])
        | st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
        min_size=9,
        max_size=9,
    ),
    budget=st.integers(0, 9),
)
def test_threshold_is_exact_for_any_scores(row, budget):
    row = np.asarray(row, np.float32)
    entries = jnp.zeros((1, 1, 9, 8))
    places = jnp.arange(9)[None, None]
    ours = _ROW(
        jnp.asarray(row)[None, None], entries, entries, places, jnp.asarray([budget]), capacity=7
    ).columns[0, 0]
    best = [i for i in np.argsort(-row, kind="stable") if row[i] > -np.inf][: min(budget, 7)]
    np.testing.assert_array_equal(ours, [*sorted(best), *[-1] * (7 - len(best))])


DRIFT = RestKV(window=8)  # whose drift counts each query's most attended positions


def check_thresholds(thresholds, columns=700):
    """Of rows with ties, with zeros, and of more columns than a step of the search."""
    r = np.random.default_rng(0)
    few = r.integers(0, 3, columns) / 4
    values = np.stack([r.random(columns), few, np.zeros(columns)]).astype(np.float32)
    for counts in ([1, 1, 1], [250, 250, 250], [columns, columns - 1, columns]):
        lows, cuts = map(np.asarray, thresholds(jnp.asarray(values), jnp.asarray(counts)))
        rows = zip(values, values.view(np.int32), counts, lows, cuts, strict=True)
        for row, bits, count, low, cut in rows:
            marked = (bits > low) | ((bits == low) & (np.arange(columns) < cut))
            largest = np.argsort(-row, kind="stable")[:count]
            np.testing.assert_array_equal(np.flatnonzero(marked), np.sort(largest))


def test_tpu_kernel_finds_thresholds():
    check_thresholds(quick_jit(functools.partial(kernel_tpu.thresholds, interpret=True)))


@pytest.mark.parametrize("kind", ["TPU v5e", GPU])
def test_drift_of_the_window_is_found_by_the_same_kernel(kind):
    """On a host without jax-triton in as many passes for every row, of which none is waited for."""
    shapes = jnp.zeros((1, 4, 8, 256)), jnp.zeros((1, 2, 256, 256)), jnp.zeros((4, 256, 64))

    def run(q, k, w_o):
        return compression.score(DRIFT, layer_inputs(q, k, k, w_o), capacity=64)

    text = lowered(run, *shapes, kind=kind)
    if kind == "TPU v5e":
        assert text.count('"eviction_threshold"') == 1
    elif without_triton("masked_eviction"):
        assert text.count("stablehlo.while") > 1
    else:  # three kernels score, two find thresholds and cuts
        assert text.count("triton_kernel_call") == 5


@pytest.mark.parametrize(
    "policy",
    [SnapKV(window=4, granularity="query_head"), H2O(window=4), KeyDiff(), Streaming()],
    ids=lambda policy: policy.name,
)
def test_policies_hand_the_kernel_what_they_hand_the_reference(policy, monkeypatch):
    r = np.random.default_rng(0)
    shapes = (2, 4, 30, 8), (2, 2, 30, 8), (2, 2, 30, 8), (4, 8, 20)
    layer = layer_inputs(
        *(jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in shapes),
        lengths=jnp.asarray([30, 17]),
    )
    options = {"capacity": 12, "budget": jnp.asarray([12, 9])}
    expected = compression.compress(policy, layer, **options)
    columns = compression.select(policy, layer, **options)
    first = np.asarray([0, 13])[:, None, None]
    np.testing.assert_array_equal(expected.positions, np.where(columns >= 0, columns - first, -1))
    monkeypatch.setattr(compression, "masked_eviction", functools.partial(by_tpu, interpret=True))
    ours = compression.compress(policy, layer, **options)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_policies_that_select_otherwise_stay_out_of_the_op():
    others = {name for name, kind in POLICIES.items() if not kind().selects_by_importance}
    assert others == {"full", "streaming"}


def test_heads_and_rows_split_over_devices():
    spec = NAMED["by_head"]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    both, rows = P("data", "model"), P("data")
    run = functools.partial(by_tpu, **spec.options, interpret=True)
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(both, both, both, both, rows), out_specs=both, check_vma=False
    )
    check(spec, jnp.float32, quick_jit(split))


def test_the_kernels_are_lowered_for_tpu_and_the_reference_for_cpu():
    spec = NAMED["decode_int8"]
    op = functools.partial(masked_eviction, **spec.options)
    args = spec.inputs(jnp.bfloat16)
    text = lowered(op, *args)
    assert "eviction_threshold" in text
    assert "eviction_move" in text
    assert "eviction_move" not in jax.jit(op).lower(*args).as_text()


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_shapes_are_those_of_the_inputs(spec):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), spec.shapes(jnp.bfloat16))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), spec.inputs(jnp.bfloat16))


@pytest.mark.parametrize(
    ("capacity", "dtype", "reason"), [(9, jnp.float16, "float16"), (60_000, jnp.float32, "VMEM")]
)
def test_no_kernel_is_named_in_vain(capacity, dtype, reason):
    args = NAMED["by_head"].inputs(dtype)
    with pytest.raises(NotImplementedError, match=rf"masked_eviction.*{reason}"):
        masked_eviction(*args, capacity=capacity, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("index", "bad", "culprit"),
    [
        (1, jnp.zeros((2, 2, 5, 64)), "k"),
        (2, jnp.zeros((2, 3, 700, 64)), "v"),
        (3, jnp.zeros((1, 2, 700), int), "positions"),
        (4, jnp.zeros((1,), int), "budget"),
    ],
)
def test_bad_arguments_name_the_culprit(index, bad, culprit):
    args = list(NAMED["by_head"].inputs(jnp.float32))
    args[index] = bad
    with pytest.raises(ValueError, match=rf"^{culprit}:"):
        masked_eviction(*args, capacity=9)
