"""Blocked causal attention against a dense softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.decode import LayerSpec
from restkv_jax.prompt_attention import BLOCK, causal_attention
from restkv_jax.received_attention import attention_and_received, received_attention


def dense(q, k, v, length, spec):
    k, v = (np.repeat(x, spec.group_size, axis=0) for x in (k, v))
    columns = q.shape[1]
    logits = spec.scale * np.einsum("nqh,nkh->nqk", q, k)
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    distance = np.arange(columns)[:, None] - np.arange(columns)
    seen = (distance >= 0) & (np.arange(columns) >= columns - length)
    if spec.window is not None:
        seen &= distance < spec.window
    logits = np.where(seen, logits.astype(np.float64), -1e30)
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("nqk,nkh->nqh", weights, v), weights.sum(1)


@pytest.mark.parametrize("columns", [1, 63, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"window": 40}], ids=str)
def test_equals_dense_attention(columns, kv_heads, extra):
    r = np.random.default_rng(columns)
    spec = LayerSpec(num_heads=4, num_kv_heads=kv_heads, head_dim=8, scale=0.7, **extra)
    q = r.standard_normal((2, 4, columns, 8)).astype(np.float32)
    k, v = (r.standard_normal((2, kv_heads, columns, 8)).astype(np.float32) for _ in range(2))
    lengths = np.asarray([columns, max(1, columns // 3)])
    out, log_sums = causal_attention(q, k, v, jnp.asarray(lengths), spec=spec)
    received = received_attention(q, k, jnp.asarray(lengths), log_sums, spec=spec)
    together = attention_and_received(q, k, v, jnp.asarray(lengths), spec=spec)
    np.testing.assert_array_equal(together[0], out)
    np.testing.assert_array_equal(together[1], log_sums)
    for b, length in enumerate(lengths):
        expected, sums = dense(q[b], k[b], v[b], length, spec)
        np.testing.assert_allclose(received[b], sums, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(together[2][b], sums, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(out[b, :, -length:], expected[:, -length:], atol=3e-6)
        assert (np.asarray(out[b, :, : columns - length]) == 0).all()


def test_what_keys_receive_survives_rows_far_below_the_first_block():
    # The second half's queries see the first block at logits of about -1e3, and their own at 0.
    columns = 2 * BLOCK
    q = np.ones((1, 1, columns, 1), np.float32)
    k = np.where(np.arange(columns) < BLOCK, -1e3, 0.0).astype(np.float32)[None, None, :, None]
    spec = LayerSpec(num_heads=1, num_kv_heads=1, head_dim=1, scale=1.0)
    received = attention_and_received(q, k, k, jnp.asarray([columns]), spec=spec)[2]
    _, sums = dense(q[0], k[0], k[0], columns, spec)
    np.testing.assert_allclose(received[0], sums, rtol=2e-5, atol=1e-6)


def test_memory_does_not_grow_with_the_square_of_the_length():
    spec = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)

    def temporary(columns):
        shape = jax.ShapeDtypeStruct
        lowered = jax.jit(causal_attention, static_argnames="spec").lower(
            shape((1, 4, columns, 16), jnp.float32),
            shape((1, 2, columns, 16), jnp.float32),
            shape((1, 2, columns, 16), jnp.float32),
            shape((1,), jnp.int32),
            spec=spec,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(16 * BLOCK) < 2.2 * temporary(8 * BLOCK)
    assert temporary(16 * BLOCK) < 4 * 4 * (16 * BLOCK) ** 2 / 4
