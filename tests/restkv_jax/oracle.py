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


def all_weights(q, k, *, scale):
    """Causal weights of all queries of each query head, [N, L, L]."""
    group = q.shape[0] // k.shape[0]
    return np.stack([attention(q[n], k[n // group], scale=scale) for n in range(q.shape[0])])


def non_causal_but_for_the_window(q, k, *, scale, window):
    """Weights of the released H2O: only the last W x W corner is masked."""
    logits = scale * q.astype(np.float64) @ k.astype(np.float64).T
    corner = logits[-window:, -window:]
    corner[np.triu_indices_from(corner, 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def caote(weights, v, *, fast):
    """α/(1-α)·‖o - v_n‖ with α = the mean of W rows, normalised over the past."""
    past = weights.shape[1] - weights.shape[0]
    alpha = weights.mean(0)[:past]
    alpha = alpha / alpha.sum()
    output = v[:past].mean(0) if fast else alpha @ v[:past]
    return alpha / (1.0 - alpha) * np.linalg.norm(output - v[:past], axis=-1)


def dropkv(weights, v):
    """Σ_t (A/(1-A))² ‖v_n - o_t‖², o_t over all keys."""
    past = weights.shape[1] - weights.shape[0]
    total = np.zeros(past)
    for a in weights:
        total += ((a / (1.0 - a)) ** 2 * ((v - a @ v) ** 2).sum(-1))[:past]
    return total


def keydiff(k):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return -(unit @ anchor) / np.linalg.norm(anchor)


def expected_attention(q, k, *, scale, sinks):
    """softmax of μ·k s + s²/2 kᵀΣk over the keys behind the sinks; sinks get 0."""
    mean = q.mean(0)
    covariance = (q - mean).T @ (q - mean) / len(q)
    logits = scale * k @ mean + scale**2 / 2 * np.array([key @ covariance @ key for key in k])
    weights = np.exp(logits[sinks:] - logits[sinks:].max(initial=0.0))
    return np.concatenate([np.zeros(min(sinks, len(k))), weights / max(weights.sum(), 1e-300)])


def critical(scores, norms, budget, *, share, epsilon):
    """Past scores after two stages; what the first one takes is +inf."""
    first = top(scores, int(share * budget))
    second = (scores + epsilon) * norms
    second[first] = np.inf
    return second


def ladder(length, budget, layer, num_layers, *, sinks, span, overlap):
    """LaCache by walking: blocks are taken off a list of tokens and put back shorter."""
    before = 1 + -(-(num_layers - span) // (span - overlap))
    after = min(-(-span // (span - overlap)), before)

    def walk(tokens, blocks, size, stride):
        kept, rest = tokens[:sinks], tokens[sinks:]
        skip = layer % (size - after + 1)
        for block in range(blocks):
            start = block * size + skip
            kept = kept + rest[start : start + stride * (after - 1) + 1 : stride]
        return kept + rest[blocks * size :]

    tokens = list(range(length))
    surplus = length - budget
    if surplus <= 0:
        return tokens
    room = (budget - sinks - num_layers) // after
    tokens = walk(tokens, min(-(-surplus // (before - after)), room), before, 1)
    surplus = len(tokens) - budget
    if surplus > 0:
        times = -(-surplus // (room * (before - after)))
        size = before + (times - 1) * (before - 1)
        tokens = walk(tokens, -(-surplus // (size - after)), size, times)
    return sorted(set(tokens))
