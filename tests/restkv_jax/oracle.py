"""The equations in NumPy float64, written without a look at the library."""

from __future__ import annotations

import numpy as np


def attention(q, k, *, scale, softcap=None):
    """Causal softmax weights of the last W queries over all T keys of one head."""
    rows, columns = q.shape[0], k.shape[0]
    logits = scale * q.astype(np.float64) @ k.astype(np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits[np.arange(columns) > np.arange(rows)[:, None] + columns - rows] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def ema(rows, alpha):
    """acc ← row_0; acc ← alpha row_i + (1 - alpha) acc."""
    acc = rows[0]
    for row in rows[1:]:
        acc = alpha * row + (1.0 - alpha) * acc
    return acc


def brute_force(weights, v, w_o):
    """‖o W_O - o_without_n W_O‖ by really leaving key n out: the meaning of Eq. 7."""
    errors = np.zeros_like(weights)
    for row, a in enumerate(weights):
        full = a @ v @ w_o
        for n in np.flatnonzero(a):
            others = np.delete(a, n)
            rest = others / others.sum() @ np.delete(v, n, axis=0) @ w_o
            errors[row, n] = np.linalg.norm(full - rest)
    return errors


def released(weights, v, w_o, alpha, window):
    """ā/(1-ā)·‖(ō - v_n) W_O‖ with ā the moving average and ō of past keys alone."""
    past = weights.shape[1] - window
    averaged = ema(weights, alpha)[:past]
    output = averaged @ v[:past]
    distance = np.linalg.norm((output - v[:past]) @ w_o, axis=-1)
    return averaged / (1.0 - averaged) * distance


def average_pool(scores, kernel):
    half = kernel // 2
    padded = np.pad(scores, half)
    return np.array([padded[i : i + kernel].sum() / kernel for i in range(scores.size)])


def replicate_pool(scores, kernel, shift):
    index = np.arange(scores.size)[:, None] + shift + np.arange(-(kernel // 2), kernel // 2 + 1)
    return scores[np.clip(index, 0, scores.size - 1)].mean(-1)


def top(scores, count):
    """The `count` largest, ties to the lower position, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
