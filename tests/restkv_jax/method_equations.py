"""Every method's equations in NumPy, and the padded batch on which they are compared."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.policies import (
    CAOTE,
    H2O,
    TOVA,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    RestKV,
    SnapKV,
    VNorm,
)
from tests.restkv_jax import oracle

N, K, W, T, H, D = 4, 2, 4, 48, 8, 20
GROUP, SCALE, BUDGET = N // K, H**-0.5, 12
LENGTHS = (48, 29, 7)
EXPECTED = {"rows": 16, "sinks": 4}


def batch(peak=2.0, value=1.0, dtype=np.float32, seed=0):
    """Rows of three lengths, right-aligned behind padding that no method may look at."""
    r = np.random.default_rng(seed)
    q, k, v = (r.standard_normal((len(LENGTHS), heads, T, H)) for heads in (N, K, K))
    q, v = peak * q, value * v
    for row, length in enumerate(LENGTHS):
        for x in (q, k, v):
            x[row, :, : T - length] = 77.0
    w_o = r.standard_normal((N, H, D)) / np.sqrt(N * H)
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v, w_o)]
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    return layer_inputs(*arrays, lengths=lengths, index=jnp.int32(1), num_layers=4)


def by_query_head(make):
    return lambda q, k, v, w_o: np.stack(
        [make(q[n], k[n // GROUP], v[n // GROUP], w_o[n]) for n in range(N)]
    )


def by_kv_head(make):
    return lambda q, k, v, w_o: np.stack([make(k[j], v[j]) for j in range(K)])


def grouped(make):
    def mean(*arrays):
        scores = make(*arrays)
        return scores.reshape(K, GROUP, -1).mean(1)

    return mean


def windowed(make, sinks=0):
    """Pins the window and the sinks around scores of the past."""

    def pinned(*arrays):
        past = make(*arrays)
        scores = np.concatenate([past, np.full((len(past), W), np.inf)], -1)
        scores[:, :sinks] = np.inf
        return scores

    return pinned


def window_weights(q, k):
    return oracle.attention(q[-W:], k, scale=SCALE)


def h2o(q, k, v, w_o):
    return oracle.attention(q, k, scale=SCALE).sum(0)[:-W]


def h2o_released(q, k, v, w_o):
    return oracle.non_causal_but_for_the_window(q, k, scale=SCALE, window=W).sum(0)[:-W]


def tova(q, k, v, w_o):
    return np.tile(oracle.all_weights(q, k, scale=SCALE)[:, -1].mean(0), (K, 1))


def tova_last(*arrays):
    scores = tova(*arrays)
    scores[:, -1] = np.inf
    return scores


def expected(q, k, v, w_o, values=True):
    start = max(len(k) - EXPECTED["rows"], min(EXPECTED["sinks"], len(k) - 1))
    weights = oracle.expected_attention(q[start:], k, scale=SCALE, sinks=EXPECTED["sinks"])
    scores = weights * np.linalg.norm(v, axis=-1) if values else weights
    scores[: EXPECTED["sinks"]] = np.inf
    return scores


def snapkv_mean(q, k, v, w_o):
    return oracle.average_pool(window_weights(q, k).mean(0)[:-W], 5)


def critical(granularity):
    def make(q, k, v, w_o):
        scores = by_query_head(snapkv_mean)(q, k, v, w_o)
        norms = by_query_head(lambda q, k, v, w_o: np.abs(v @ w_o).sum(-1)[:-W])(q, k, v, w_o)
        if granularity == "kv_head":
            scores, norms = (x.reshape(K, GROUP, -1).mean(1) for x in (scores, norms))
        pairs = zip(scores, norms, strict=True)
        two_stages = functools.partial(oracle.critical, share=0.5, epsilon=1e-4)
        return np.stack([two_stages(s, norm, BUDGET - W) for s, norm in pairs])

    return make


def robust(q, k, v, w_o):
    scores = oracle.released(window_weights(q, k), v, w_o, 0.3, W)
    scores[:4] = 0.0
    return oracle.average_pool(scores, 21)


def vnorm(q, k, v, w_o):
    norms = [np.linalg.norm(v[n // GROUP] @ w_o[n], axis=-1) for n in range(N)]
    norms = np.stack(norms).reshape(K, GROUP, -1).mean(1)
    norms[:, :2] = 0.0
    scores = np.stack([oracle.average_pool(row, 5) for row in norms])
    scores[:, :2] = scores[:, -3:] = np.inf
    return scores


def snapkv_sinks(q, k, v, w_o):
    scores = window_weights(q, k).sum(0)[:-W]
    scores[:2] = -np.inf
    padded = np.pad(scores, 3, constant_values=-np.inf)
    return np.array([padded[i : i + 7].max() for i in range(scores.size)])


def adaptive_sinks(q, k, v, w_o):
    scores = oracle.released(window_weights(q, k), v, w_o, 0.3, W)
    if scores.size > 2:
        scores[2:] = oracle.replicate_pool(scores[2:], 5, 0)
    return scores


# (policy, its scores from one row's q, k, v [heads, T, H] and W_O, padding cut off).
CASES = [
    (H2O(window=W), windowed(grouped(by_query_head(h2o)))),
    (
        H2O(window=W, released=True, granularity="query_head"),
        windowed(by_query_head(h2o_released)),
    ),
    (TOVA(), tova),
    (TOVA(recent=1), tova_last),
    (Knorm(), by_kv_head(lambda k, v: -np.linalg.norm(k, axis=-1))),
    (VNorm(sinks=2, recent=3, kernel=5), vnorm),
    (KeyDiff(), by_kv_head(lambda k, v: oracle.keydiff(k))),
    (ExpectedAttention(**EXPECTED), grouped(by_query_head(expected))),
    (
        ExpectedAttention(**EXPECTED, values=False, granularity="query_head"),
        by_query_head(functools.partial(expected, values=False)),
    ),
    (
        CAOTE(window=W),
        windowed(
            grouped(
                by_query_head(
                    lambda q, k, v, w_o: oracle.caote(window_weights(q, k), v, fast=False)
                )
            )
        ),
    ),
    (
        CAOTE(window=W, fast=True, granularity="query_head"),
        windowed(
            by_query_head(lambda q, k, v, w_o: oracle.caote(window_weights(q, k), v, fast=True))
        ),
    ),
    (
        DropKV(window=W),
        windowed(
            grouped(by_query_head(lambda q, k, v, w_o: oracle.dropkv(window_weights(q, k), v)))
        ),
    ),
    (CriticalKV(window=W), windowed(critical("kv_head"))),
    (CriticalKV(window=W, granularity="query_head"), windowed(critical("query_head"))),
    (RestKV.robust(window=W, recent=None), windowed(grouped(by_query_head(robust)), sinks=4)),
    (
        SnapKV(window=W, sinks=2, kernel=7, pooling="maxpool", granularity="query_head"),
        windowed(by_query_head(snapkv_sinks), sinks=2),
    ),
    (
        RestKV(window=W, sinks=2, granularity="query_head"),
        windowed(by_query_head(adaptive_sinks), sinks=2),
    ),
]
