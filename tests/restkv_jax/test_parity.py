"""The reference implementation's numbers, one test per case."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from restkv_jax import budget as budgets
from restkv_jax.layer import LayerInputs, layer_inputs, select
from restkv_jax.policies import Ablation, Policy, RestKV, SnapKV, Streaming
from tests.restkv_jax import parity

TEMPORAL = {"ema": "ema", "mean": "mean", "inv-ema": "inverse_ema", "none": "last"}
METHODS = ("restkv", "ablation", "snapkv", "streamingllm")
CASES = [case for case in parity.cases() if case["params"]["method"] in METHODS]


def policy_of(params: dict) -> Policy:
    """Our configuration for a case's parameters."""
    method, window = params["method"], params["window"]
    shared = {"window": window, "granularity": "query_head"}
    if method == "streamingllm":
        return Streaming(sinks=params["cap"] - window)
    if method == "snapkv":
        return SnapKV(kernel=params["kernel"], pooling=params["pooling"], **shared)
    if method == "ablation":
        reconstruction = params["indicator"] == "reconstruction"
        return Ablation(
            indicator=params["indicator"],
            temporal=TEMPORAL[params["ts"]] if reconstruction else "ema",
            spatial=params["ss"] if reconstruction else "adaptive",
            **shared,
        )
    before = params["metric_mode"] == "before"
    return RestKV(
        form=params["metric_mode"],
        temporal="ema" if params["use_ema"] else "mean",
        alpha=params["alpha"],
        tau=1.0 if before else params["tau"],
        relative=before and params["use_norm"],
        project=params["use_wo"],
        spatial=params["pooling"],
        kernel=params["kernel"],
        scale=params["scale"],
        **shared,
    )


def layer_of(case: dict) -> tuple[LayerInputs, tuple[np.ndarray, ...]]:
    """The case's inputs, checked against what is stored of them."""
    heads, size = case["H"], case["D"]
    window, kind = case["params"]["window"], case["kind"]
    q, k, v, w_o = parity.make_inputs(case["seed"], heads, case["L"], size, case["C"], window, kind)
    by_head = w_o.reshape(case["C"], heads, size).transpose(1, 2, 0)
    return layer_inputs(q[:, :, -window:], k, v, by_head), (q, k, v, w_o)


def assert_same_set(ours: np.ndarray, theirs: np.ndarray, pooled: np.ndarray, cut: float) -> None:
    """Equal sets, but for exchanges among positions at the cut (1e-5 relative)."""
    for position in set(ours.tolist()) ^ set(theirs.tolist()):
        assert abs(pooled[position] - cut) <= 1e-5 * max(abs(cut), 1e-30), position


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"].removesuffix(".npz"))
def test_parity(case: dict) -> None:
    stored = np.load(parity.FOLDER / case["file"])
    params = case["params"]
    cap, window, length = params["cap"], params["window"], case["L"]
    layer, inputs = layer_of(case)
    for array, row in zip(inputs, stored["inputs_checksum"], strict=True):
        sums = [array.sum(dtype=np.float64), np.abs(array).sum(dtype=np.float64)]
        np.testing.assert_allclose([*sums, array.flat[0], array.flat[-1]], row, rtol=1e-6)
    policy = policy_of(params)

    if case["unchanged"]:
        kept = jax.jit(select, static_argnums=0, static_argnames="capacity")(
            policy, layer, capacity=cap
        )
        assert (np.sort(np.asarray(kept)[..., :length]) == np.arange(length)).all()
        return
    if isinstance(policy, Streaming):
        kept = jax.jit(select, static_argnums=0, static_argnames="capacity")(
            policy, layer, capacity=cap
        )
        np.testing.assert_array_equal(kept[0], np.sort(stored["kept_positions"], -1))
        return

    past = cap - window
    count = np.full(1, past, np.int32)
    pooled = jax.jit(policy.past_scores, static_argnums=1)(layer, past, count)[0]
    top = stored["pooled"].max(-1, keepdims=True)
    np.testing.assert_allclose(pooled / top, stored["pooled"] / top, atol=1e-4, rtol=0)
    if params["use_pyramid"]:
        past = budgets.pyramid_past(
            past, length - window, layer=params["layer_idx"], num_layers=params["num_layers"]
        )
    kept = jax.jit(select, static_argnums=0, static_argnames="capacity")(
        policy, layer, capacity=past + window
    )
    kept = np.asarray(kept[0])
    assert (np.diff(kept, axis=-1) > 0).all()
    assert (kept[:, -window:] == np.arange(length - window, length)).all()
    maxpool = "maxpool" in (params["pooling"], params.get("ss"))
    for head, indices in enumerate(stored["indices"]):
        ours, row = kept[head, :-window], stored["pooled"][head]
        if maxpool:  # plateaus tie at the cut: which of them is taken is free
            np.testing.assert_allclose(np.sort(row[ours]), np.sort(row[indices]), rtol=1e-5, atol=0)
        else:
            assert_same_set(ours, indices, row, float(stored["cut_value"][head]))
