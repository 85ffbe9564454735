"""Attention of a prompt over itself by cuDNN, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.protocols import LayerSpec


def causal_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    spec: LayerSpec,
) -> Float[Array, "B N T H"]:
    """The outputs of `restkv_jax.prompt_attention.causal_attention`, padding's at 0.

    cuDNN knows padding only behind a row's tokens, so the rows are moved to the left and back:
    8 passes over arrays of size T, beside T² products. Whether there is any padding is known on
    the device alone.
    """
    columns = q.shape[2]
    place = jnp.arange(columns)
    ahead = columns - lengths[:, None]  # columns of padding

    def moved(x: Array, by: Array) -> Array:
        return jnp.take_along_axis(x, ((place + by) % columns)[:, :, None, None], axis=1)

    q, k, v = (moved(jnp.swapaxes(x, 1, 2), ahead) for x in (q, k, v))
    out = moved(_attend(q, k, v, lengths.astype(jnp.int32), spec=spec), -ahead)
    out = jnp.where((place >= ahead)[:, :, None, None], out, 0)
    return jnp.swapaxes(out, 1, 2)


def _attend(q: Array, k: Array, v: Array, lengths: Array, *, spec: LayerSpec) -> Array:
    """Of [B, T, heads, H] with the padding last."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=spec.scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        # So many before the query; the spec's window counts the query itself.
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation="cudnn",
    )


def refusal(q: Any, k: Any, spec: LayerSpec) -> str | None:
    """Why cuDNN cannot attend here, None if it can.

    Args:
        q: [B, N, T, H] queries, of which only shape and dtype are looked at.
        k: [B, K, T, H] keys, likewise.
        spec: of the layer.
    """
    if spec.softcap is not None:
        return "cuDNN knows no soft cap"
    by_token = [
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)
        for x in (q, k, k)
    ]
    lengths = jax.ShapeDtypeStruct((q.shape[0],), jnp.int32)
    try:  # JAX knows what its cuDNN supports, and whether there is one in this process.
        jax.eval_shape(functools.partial(_attend, spec=spec), *by_token, lengths)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
