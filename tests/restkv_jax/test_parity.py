"""The reference implementation's numbers, one test per case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.masked_eviction import select_slots
from restkv_jax import budget as budgets
from restkv_jax.allocation import adakv_counts
from restkv_jax.compression import select
from restkv_jax.layer import LayerInputs
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import H2O, Ablation, Policy, RestKV, SnapKV, Streaming
from tests.restkv_jax import parity

TEMPORAL = {"ema": "ema", "mean": "mean", "inv-ema": "inverse_ema", "none": "last"}
CASES = parity.cases()
select = jax.jit(select, static_argnums=0, static_argnames="capacity")
select_slots = jax.jit(select_slots, static_argnames="capacity")
adakv_shares = jax.jit(adakv_counts, static_argnames=("most", "floor", "normalize"))


def policy_of(params: dict) -> Policy:
    """Our configuration for a case's parameters."""
    method, window = params["method"], params["window"]
    shared = {"window": window, "granularity": "query_head"}
    if method == "streamingllm":
        return Streaming(sinks=params["cap"] - window)
    if method == "h2o":
        return H2O(released=True, **shared)
    if method in ("snapkv", "pyramidkv", "adakv"):
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
    rows = case["L"] if case["params"]["method"] == "h2o" else window
    return layer_inputs(q[:, :, -rows:], k, v, by_head), (q, k, v, w_o)


def past_of(params: dict, length: int) -> int:
    """Past tokens that a layer keeps."""
    cap, window = params["cap"], params["window"]
    layer = {"layer": params["layer_idx"], "num_layers": params["num_layers"]}
    if params["method"] == "pyramidkv":
        return budgets.pyramid_slots(cap, length, window=window, **layer) - window
    if params["use_pyramid"]:
        return budgets.pyramid_past(cap - window, length - window, **layer)
    return cap - window


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
        kept = select(policy, layer, capacity=cap)
        assert (np.sort(np.asarray(kept)[..., :length]) == np.arange(length)).all()
        return
    if isinstance(policy, Streaming):
        kept = select(policy, layer, capacity=cap)
        np.testing.assert_array_equal(kept[0], np.sort(stored["kept_positions"], -1))
        return

    past = cap - window
    count = np.full(1, past, np.int32)
    pooled = jax.jit(policy.past_scores, static_argnums=1)(layer, past, count)[0]
    if params["method"] == "adakv":  # a mean over the window, where SnapKV has a sum
        pooled = pooled / window
    top = stored["pooled"].max(-1, keepdims=True)
    np.testing.assert_allclose(pooled / top, stored["pooled"] / top, atol=1e-4, rtol=0)
    if params["method"] == "adakv":
        options = {"floor": params["floor"], "normalize": params["normalize"]}
        slots = adakv_shares(pooled[None], jnp.asarray([past]), most=past, **options)[0]
        np.testing.assert_array_equal(slots + window, stored["head_lens"])
        # One row for each head: their budgets differ.
        kept = select_slots(pooled[:, None], capacity=length - window, budget=slots)[:, 0]
        kept = [row[row >= 0] for row in np.asarray(kept)]
    else:
        kept = np.asarray(select(policy, layer, capacity=past_of(params, length) + window)[0])
        assert (np.diff(kept, axis=-1) > 0).all()
        assert (kept[:, -window:] == np.arange(length - window, length)).all()
        kept = kept[:, :-window]
    if params["method"] == "adakv":
        flat = np.split(stored["kept_positions_flat"], np.cumsum(stored["head_lens"])[:-1])
        theirs = [positions[positions < length - window] for positions in flat]
    else:
        theirs = stored["indices"]
    maxpool = "maxpool" in (params["pooling"], params.get("ss"))
    for head, indices in enumerate(theirs):
        ours, row = kept[head], stored["pooled"][head]
        if maxpool:  # plateaus tie at the cut: which of them is taken is free
            np.testing.assert_allclose(np.sort(row[ours]), np.sort(row[indices]), rtol=1e-5, atol=0)
        else:
            assert_same_set(ours, indices, row, float(row[indices].min()))
