"""A layer's inputs from plain arrays, for callers that have no model here."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.window_scores import output_factor
from restkv_jax.layer import LayerInputs, Probe
from restkv_jax.protocols import LayerSpec


def layer_inputs(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    w_o: Float[Array, "N H D"],
    *,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    index: int | Int[Array, ""] = 0,
    num_layers: int = 1,
    probe: Probe | None = None,
) -> LayerInputs:
    """Wraps one layer's arrays for `score`, `select` and `compress`.

    Args:
        q: the last Q queries after rotary embedding; policies need at least their window.
        k: keys after rotary embedding, right-aligned: padding comes first.
        v: values.
        w_o: output projection by head.
        lengths: tokens in each row; all T by default.
        scale: factor on q·k, 1 / sqrt(H) by default.
        softcap: of the attention logits, if the model has one.
        sliding_window: of this layer, if it has one.
        index: which layer this is, for policies whose sets differ by layer.
        num_layers: layers of the model.
        probe: queries from elsewhere that score, see `Probe`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, heads, _, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1]:
        raise ValueError(
            "q, k, v: expected [B, N, Q, H] and twice [B, K, T, H] with N a multiple of K, got "
            f"{q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} queries, but only {k.shape[2]} keys")
    if w_o.shape[:2] != (heads, size):
        raise ValueError(f"w_o: expected [N, H, D] = [{heads}, {size}, D], got {w_o.shape}")
    spec = LayerSpec(
        num_heads=heads,
        num_kv_heads=k.shape[1],
        head_dim=size,
        scale=size**-0.5 if scale is None else scale,
        softcap=softcap,
        window=sliding_window,
    )
    if lengths is None:
        lengths = jnp.full(batch, k.shape[2], jnp.int32)
    return LayerInputs(
        q=q,
        k=k,
        v=v,
        factor=output_factor(w_o),
        lengths=jnp.asarray(lengths, jnp.int32),
        spec=spec,
        w_o=w_o,
        index=index,
        num_layers=num_layers,
        probe=probe,
    )
