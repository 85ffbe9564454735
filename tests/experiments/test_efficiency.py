"""The efficiency experiment: what it counts, what it refuses, what it writes and goes on with."""

from __future__ import annotations

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core.errors import UserError
from experiments.core.options import parse_policy
from experiments.efficiency import __main__ as program
from experiments.efficiency import layers
from experiments.efficiency.cells import Cell, DoesNotFit, abstract_cache, compile_cell, make_cells
from experiments.efficiency.cli import build_parser
from experiments.efficiency.report import table
from experiments.efficiency.subject import RANDOM, open_subject
from experiments.efficiency.work import Work, decode_work, prefill_work, read_weights_bytes
from experiments.kernel_bench import Floor
from models import ModelConfig
from restkv_jax.decode import CachePlan, LayerSpec, RestKV, SnapKV, Streaming
from tests.models.real_configs import REAL

FLOOR = Floor(1e9, 1e11)
TINY = "random:tiny"
# Its D 32, N 4, K 2, H 8, F 64, V 128 in 2 layers, 5 norms; a token reads all but the embedding.
BLOCKS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
MATRICES = BLOCKS + 32 * 128
READ_BYTES = 4 * (MATRICES + 5 * 32)


def cell(policy, length=256, batch=1, budget=64):
    return Cell(length, batch, parse_policy(policy), budget)


@functools.cache
def tiny():
    return open_subject(TINY, "float32")


def test_random_weights_have_the_published_shapes():
    config = open_subject("random:llama-3.1-8b", "bfloat16").config
    assert config == ModelConfig.from_hf(
        REAL["llama-3.1-8b"][0] | {"max_position_embeddings": None}
    )
    # All 8,030,261,248 parameters but the embedding, of which a token reads one row.
    assert read_weights_bytes(config, jnp.bfloat16) == 2 * (8_030_261_248 - 128256 * 4096)
    # As int8 a byte for each number of a matrix and 4 for each output; 65 norms of bfloat16.
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 128256
    norms = 65 * 4096
    expected = 8_030_261_248 - 128256 * 4096 + norms + 4 * outputs
    assert read_weights_bytes(config, jnp.int8) == expected
    mistral = open_subject("random:mistral-7b", "bfloat16").config
    assert mistral.windows == (None,) * 32
    with pytest.raises(UserError, match=r"random:7b: unknown shape, known are llama-3\.1-8b"):
        open_subject("random:7b", "float32")


def test_operations_of_a_prefill_are_counted_by_hand():
    config = tiny().config
    pairs = 10 * 11 // 2
    expected = 2 * BLOCKS * 10 + 2 * 32 * 128 + 2 * pairs * 4 * (2 * 8 + 2 * 8)
    assert prefill_work(config, jnp.float32, 3, 10).flops == 3 * expected
    sliding = ModelConfig(**{**vars_of(config), "windows": (4, None)})
    fewer = pairs - sum(min(t, 4) for t in range(1, 11))
    assert prefill_work(sliding, jnp.float32, 3, 10).flops == 3 * (expected - fewer * 4 * 32)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.mark.parametrize(("policy", "sets"), [("snapkv", 2), ("snapkv:granularity=query_head", 4)])
def test_bytes_and_operations_of_a_step_are_counted_by_hand(policy, sets):
    config = tiny().config
    found = cell(policy, batch=3)
    cache = abstract_cache(tiny(), found, found.plan(16))
    work = decode_work(config, jnp.float32, 3, cache)
    slots = 64 + 16
    assert cache.kv_bytes == 3 * 2 * sets * slots * 2 * 8 * 4
    assert work.bytes == READ_BYTES + cache.kv_bytes
    assert work.flops == 3 * (2 * MATRICES + 2 * slots * 4 * 4 * 8)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    assert Work(2 * 10**9, 10**11).seconds(FLOOR) == pytest.approx(2.0)
    assert Work(10**9, 3 * 10**11).seconds(FLOOR) == pytest.approx(3.0)


def test_cells_are_all_combinations_and_the_largest_come_last():
    policies = tuple(map(parse_policy, ("full", "snapkv", "restkv:budget=32")))
    cells = make_cells((512, 256), (2, 1), policies, (64, 128))
    assert [c.key for c in cells[:4]] == [
        "256x1/snapkv 64",
        "256x1/snapkv 128",
        "256x1/restkv+budget=32",
        "256x1/full",
    ]
    assert len({c.key for c in cells}) == len(cells) == 2 * 2 * 4
    sizes = [c.length * c.batch for c in cells]
    assert sizes == sorted(sizes)
    with pytest.raises(UserError, match="--budget 512: more slots than the prompt's 256 tokens"):
        cell("snapkv", budget=512).plan(16)


def test_what_cannot_fit_is_refused_before_any_array_is_made():
    """An 8B model's full cache at 128k: 8 rows, 32 layers, 8 heads, K and V of 128 bfloat16."""
    subject = open_subject("random:llama-3.1-8b", "bfloat16")
    found = Cell(131072, 8, parse_policy("full"), None)
    cache = 8 * 32 * 8 * (131072 + 128) * (2 * 128 * 2 + 4)  # with int32 positions
    weights = 2 * 8_030_261_248 + 32 * 32 * 128 * 128 * 4  # with factors of the projections
    figure = re.escape(f"{(weights + cache) / 1e9:.2f} GB do not fit into 150.00 GB")
    with pytest.raises(DoesNotFit, match=f"cache alone: {figure}"):
        compile_cell(subject, found, found.plan(128), 150 * 10**9)
    assert "model" not in vars(subject)


def test_a_compiled_program_that_needs_too_much_is_refused():
    found = cell("snapkv", length=2048)
    cache = abstract_cache(tiny(), found, found.plan(16))
    arrays = jax.tree.leaves(tiny().abstract)
    alone = sum(x.size * x.dtype.itemsize for x in arrays) + cache.total_bytes
    with pytest.raises(DoesNotFit, match="the compiled prefill"):
        compile_cell(tiny(), found, found.plan(16), alone + 1)
    impossible = cell("snapkv:heads=adakv,lists=3")
    with pytest.raises(UserError, match="lists"):
        compile_cell(tiny(), impossible, impossible.plan(16), None)


@pytest.fixture
def untimed(monkeypatch):
    def loop(op, *args, repeats):
        return 3.0 if op.__name__ == "compressed" else 1.0, jax.jit(op)(*args)

    monkeypatch.setattr(layers, "loop_seconds", loop)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        # Selecting and moving is one op, 1 s. Two layers of three are rings that keep the last 40
        # whatever the scores: there it is what the whole, 3 s, takes beyond scoring, 1 s.
        (CachePlan(policy=SnapKV(), budget=64), (3.0, 1.0 + 2 * 2.0)),
        (CachePlan(policy=RestKV(), budget=64, layers="pyramid"), (3.0, 1.0 + 2 * 2.0)),
        (CachePlan(policy=Streaming(), budget=64), (3.0, 3 * 2.0)),
    ],
    ids=lambda x: x.policy.name if isinstance(x, CachePlan) else "",
)
def test_every_layer_counts(plan, expected, untimed):
    specs = [
        LayerSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, window=window)
        for window in (40, None, 40)
    ]
    found = layers.choosing_seconds(
        plan, tuple(specs), batch=2, length=200, width=32, dtype=jnp.float32, repeats=1
    )
    assert found == expected


def test_both_attentions_of_a_full_cache_compute_the_same(monkeypatch):
    results = []

    def loop(op, *args, repeats):
        results.append(jax.tree.leaves(op(*args))[0])
        return 1.0, results[-1]

    monkeypatch.setattr(layers, "loop_seconds", loop)
    spec = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3)
    sizes = {"batch": 2, "slots": 50, "dtype": jnp.float32, "repeats": 1}
    assert layers.attention_seconds(spec, **sizes) == (1.0, 1.0)
    np.testing.assert_allclose(results[0], results[1][:, 0], atol=2e-6)
    capped = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, softcap=5.0)
    assert layers.attention_seconds(capped, **sizes) == (1.0, None)


def test_speed_is_that_of_the_best_full_cache():
    base = {"length": 256, "batch": 1, "ttft_s": 2.0, "ttft_floor_s": 1.0, "token_floor_s": 0.1}
    base |= {"tokens_per_s": 5.0, "cache_bytes": 2048, "prefill_bytes": 10, "decode_bytes": 20}
    full = base | {"policy": "full", "score_s": 0, "evict_s": 0, "token_s": 0.9}
    small = base | {"policy": "snapkv 64", "score_s": 0.02, "evict_s": 0.01, "token_s": 0.2}
    refused = {"length": 512, "batch": 1, "policy": "full", "refused": "too much"}
    found = table([full | {"baseline_token_s": 0.8}, small, refused], {"256x1": 1.5})
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert rows[1]["x full"] == "4.00"
    assert rows[1]["of dense"] == "2.00 %"
    assert found.rows[1][2] == "50 %"
    assert rows[1]["peak"] == "20 B"
    assert found.rows[2][:2] == ("512x1, full", "refused")


def test_runs_writes_goes_on_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "measure_floor", lambda dtype: FLOOR)
    monkeypatch.setattr(
        layers, "loop_seconds", lambda op, *args, repeats: (1e-3, jax.jit(op)(*args))
    )
    out = tmp_path / "out"
    options = ["--model", TINY, "--lengths", "256", "--budget", "64", "--tokens", "16"]
    options += ["--repeats", "1", "--out", str(out)]
    assert program.main([*options, "--policy", "full"]) == 0
    first = json.loads((out / "results.json").read_text())["cells"]
    full = first["256x1/full"]
    kv = 2 * 2 * (256 + 32) * 2 * 8 * 4
    assert full["cache_bytes"] > kv
    assert full["token_floor_s"] == pytest.approx((READ_BYTES + kv) / FLOOR.bandwidth)
    assert min(full["token_s"], full["ttft_s"]) > 0
    assert math.isclose(full["tokens_per_s"] * full["token_s"], 1.0)
    assert full["baseline_token_s"] == full["token_s"]  # both attentions are said to take as long

    measured = []
    real = program.measure_cell
    monkeypatch.setattr(
        program, "measure_cell", lambda *args: measured.append(args[1].key) or real(*args)
    )
    monkeypatch.setattr(program.measure, "device_memory", lambda: full["prefill_bytes"] // 2)
    both = ["--policy", "full", "--policy", "snapkv"]
    assert program.main([*options, *both]) == 0  # refused: nothing is measured
    assert "refused" in json.loads((out / "results.json").read_text())["cells"]["256x1/snapkv 64"]
    monkeypatch.setattr(program.measure, "device_memory", lambda: None)
    assert program.main([*options, "--policy", "full", "--policy", "restkv"]) == 0
    assert measured == ["256x1/restkv 64"]
    after = json.loads((out / "results.json").read_text())["cells"]
    assert after["256x1/full"] == full
    assert after["256x1/restkv 64"]["score_s"] == pytest.approx(2e-3)  # of two layers
    for name in ("first_token", "token", "memory"):
        assert (out / f"{name}_batch1.png").read_bytes().startswith(b"\x89PNG")
    assert "restkv 64" in (out / "table.md").read_text()
    assert "do not fit into" in capsys.readouterr().out
    with pytest.raises(UserError, match="was measured with another repeats"):
        program.main([*options, "--repeats", "2"])
    (out / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        program.main(options)


@pytest.mark.parametrize("option", ["--batch", "--budget"])
def test_lists_of_numbers_are_checked(option):
    for text in ("0", "1,,2", "x", "-1"):
        with pytest.raises(UserError, match=f"{option} {text}: expected whole numbers"):
            build_parser().parse_args([f"{option}={text}"])
    with pytest.raises(UserError, match="one is given twice"):
        build_parser().parse_args([option, "8,8"])


def test_full_is_its_own_baseline_where_windows_slide(tmp_path, monkeypatch):
    shape = {**RANDOM["tiny"], "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    monkeypatch.setitem(RANDOM, "tiny", shape)
    monkeypatch.setattr(program, "measure_floor", lambda dtype: FLOOR)
    options = ["--model", TINY, "--lengths", "256", "--tokens", "16", "--repeats", "1"]
    assert program.main([*options, "--policy", "full", "--out", str(tmp_path)]) == 0
    full = json.loads((tmp_path / "results.json").read_text())["cells"]["256x1/full"]
    assert full["cache_bytes"] < 2 * 2 * 256 * 2 * 8 * 4  # the layers hold their windows
    assert full["baseline_token_s"] == full["token_s"]
    assert "library_attention_s" not in full


def test_int8_weights_have_the_floor_of_their_activations(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "measure_floor", lambda dtype: asked.append(dtype) or FLOOR)
    options = ["--model", TINY, "--dtype", "int8", "--lengths", "256", "--tokens", "16"]
    options += ["--repeats", "1", "--budget", "64", "--policy", "snapkv", "--out", str(tmp_path)]
    assert program.main(options) == 0
    assert asked == ["bfloat16"]
    cell = json.loads((tmp_path / "results.json").read_text())["cells"]["256x1/snapkv 64"]
    outputs = 2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) + 128
    weights = MATRICES + 4 * outputs + 2 * 5 * 32
    kv = 2 * 2 * (64 + 32) * 2 * 8 * 2
    assert cell["token_floor_s"] == pytest.approx((weights + kv) / FLOOR.bandwidth)
