"""The benchmark of single ops: it times what it checks."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kernel_bench
from experiments.core import measure as core_measure
from experiments.core.errors import UserError
from experiments.core.measure import loop_seconds, state_loop_seconds
from pallas_kernels.decode_attention.specs import SPECS

ONE_SLOT = ["--op", "decode_attention", "--spec", "one_slot", "--dtype", "float32"]
FLOOR = kernel_bench.Floor(1e9, 1e11)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(kernel_bench, "measure_floor", lambda dtype: FLOOR)


def test_prints_and_writes_times_floors_and_errors(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    options = [
        "--op",
        "decode_attention",
        "--spec",
        "one_slot",
        "--dtype",
        "float32",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    more = ["--implementation", "xla", "--implementation", "pallas_gpu"]
    assert kernel_bench.main([*options, *more]) == 0
    result = json.loads(out.read_text())
    ran, refused = result["ops"]["decode_attention"]
    (spec,) = (spec for spec in SPECS if spec.name == "one_slot")
    # 2 rows of 4 heads with 1 slot: keys and values of 64 float32 numbers, and a position.
    assert spec.read_bytes(jnp.float32) == 2 * 4 * (2 * 64 * 4 + 4)
    assert spec.flops == 2 * 4 * 4 * 64
    assert ran["floor_ms"] == pytest.approx(1e3 * 4128 / FLOOR.bandwidth)
    assert ran["fraction"] == pytest.approx(ran["floor_ms"] / ran["ms"])
    assert ran["right"]
    assert "there is no such kernel" in refused["refused"]
    text = capsys.readouterr().out
    assert "one_slot" in text
    assert "refused" in text


@pytest.mark.parametrize(
    "off",
    [
        lambda out, positions: (1.05 * out, positions),
        lambda out, positions: (out, positions.at[0, 2, 71].add(1)),  # what it writes counts too
    ],
)
def test_a_wrong_result_is_told(off, monkeypatch, capsys):
    real = kernel_bench.OPS["decode_attention"]

    def bind(spec, implementation):
        def run(*args):
            out, (q, k, v, positions, *rest) = real.bind(spec, "xla")(*args)
            if implementation == "pallas_tpu":
                out, positions = off(out, positions)
            return out, (q, k, v, positions, *rest)

        return run

    monkeypatch.setitem(kernel_bench.OPS, "decode_attention", real._replace(bind=bind))
    options = ["--op", "decode_attention", "--spec", "mha", "--dtype", "bfloat16"]
    named = ["--repeats", "1", "--implementation", "pallas_tpu"]
    assert kernel_bench.main([*options, *named]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "spec"), [("window_scores", "attention_max"), ("masked_eviction", "decode_int8")]
)
def test_every_op_is_timed_and_checked(op, spec, tmp_path):
    out = tmp_path / "kernels.json"
    options = ["--op", op, "--spec", spec, "--repeats", "1", "--implementation", "xla"]
    assert kernel_bench.main([*options, "--out", str(out)]) == 0
    lines = json.loads(out.read_text())["ops"][op]
    (shapes,) = (one for one in kernel_bench.OPS[op].specs if one.name == spec)
    assert [line["dtype"] for line in lines] == ["float32", "bfloat16"]
    for line in lines:
        assert line["right"]
        assert line["bound"] == "bytes"
        moved = shapes.read_bytes(jnp.dtype(line["dtype"]))
        assert line["floor_ms"] == pytest.approx(1e3 * moved / FLOOR.bandwidth)


def test_projecting_to_the_models_width_is_the_same_maths(tmp_path):
    out = tmp_path / "kernels.json"
    options = ["--op", "window_scores", "--spec", "mha_64", "--dtype", "float32", "--repeats", "1"]
    options += ["--op", "decode_attention", "--spec", "one_slot"]
    assert kernel_bench.main([*options, "--implementation", "projected", "--out", str(out)]) == 0
    ops = json.loads(out.read_text())["ops"]
    assert ops["window_scores"][0]["right"]
    assert ops["decode_attention"][0]["refused"] == "nothing is projected here"
    (spec,) = (spec for spec in kernel_bench.OPS["window_scores"].specs if spec.name == "mha_64")
    run = kernel_bench.OPS["window_scores"].bind(spec, "projected")
    products = str(jax.make_jaxpr(run)(*spec.inputs(jnp.float32)))
    assert f"f32[{spec.batch},{spec.columns},{spec.heads * spec.head_dim}]" in products


def test_unknown_specs_are_refused():
    with pytest.raises(UserError, match="--spec nine: expected one of 8b_1024, "):
        kernel_bench.main(["--spec", "nine"])


def test_the_loop_gives_what_one_call_gives_and_runs_every_round():
    x = jnp.arange(8.0)
    seconds, result = loop_seconds(lambda x, y: (x * y, x.sum()), x, x, repeats=1, least_s=1e-4)
    assert 0.0 < seconds < 1.0
    np.testing.assert_array_equal(result[0], x * x)
    assert result[1] == 28.0


def test_a_loop_hands_what_an_op_changes_from_round_to_round():
    x, cache = jnp.arange(8.0), jnp.zeros(3, jnp.int32)

    def op(x, cache):
        return cache[1], (x, cache.at[1].add(1))

    _, (result, (same, written)) = state_loop_seconds(op, x, cache, repeats=2, least_s=1e-4)
    # At least one round in each of four loops, and of three more that are as long as was asked for.
    assert written[1] == result + 1 >= 7
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(cache, 0)  # what was given stays


def test_decoding_is_timed_with_the_entry_that_it_writes():
    (spec,) = (spec for spec in SPECS if spec.name == "gqa3")
    op = kernel_bench.OPS["decode_attention"]
    q, _, _, positions, query, _, new = inputs = op.inputs(spec, jnp.float32)
    out, (_, k, _, written, *_) = op.bind(spec, "xla")(*inputs)
    assert out.shape == q.shape
    row, slot = 1, int(new.slot[1])
    np.testing.assert_array_equal(k[row, :, slot], new.k[row])
    assert (written[row, :, slot] == query[row]).all()
    assert (written != positions).sum() <= 2 * spec.cache_heads  # the last row has no entry


def test_bandwidth_counts_reads_and_writes_of_the_same_memory(monkeypatch):
    places = []

    def median_seconds(run, repeats):
        places.extend(run().unsafe_buffer_pointer() for _ in range(3))
        return 0.5

    monkeypatch.setattr(core_measure, "median_seconds", median_seconds)
    assert core_measure.bytes_per_second(2**20) == 2 * 2**20 / 0.5
    assert len(set(places)) == 1  # new pages would be timed with what fills them


def test_large_shapes_are_left_out_on_cpu_unless_asked_for():
    def names(*options):
        chosen = kernel_bench._chosen(kernel_bench.build_parser().parse_args(options))
        return {spec.name for spec in chosen["decode_attention"]}

    assert not any(spec.large for spec in SPECS if spec.name in names())
    assert names("--large") == {spec.name for spec in SPECS}
    assert len({dataclasses.astuple(spec) for spec in SPECS}) == len(SPECS) == len(names("--large"))
