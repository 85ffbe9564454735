"""Layers that the model families share.

A layer takes its weights from a `Weights` function at construction, which serves loading,
random initialisation and shape listing alike, so nothing is allocated that is then thrown away.
Modules are immutable afterwards: `__call__` assigns nothing, and plain `jax.jit` applies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from models.config import ModelConfig
from models.matmul import matmul
from models.rope import rotate
from pallas_kernels.quantized import QuantArray, dequantize

Weights = Callable[[str, tuple[int, ...]], jax.Array | QuantArray | jax.ShapeDtypeStruct]
"""From a parameter's path, e.g. "layers.0.attn.q.w", and shape to its value."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale; computes in float32."""

    def __init__(self, path: str, size: int, config: ModelConfig, weights: Weights) -> None:
        self.w = nnx.Param(weights(f"{path}.w", (size,)))
        self.eps = config.rms_eps
        # Added here and not to the weights: in bfloat16 those near 0 are finer than those near 1.
        self.offset = 1.0 if config.unit_offset else 0.0

    @jax.jit
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        scale = self.w[...].astype(jnp.float32) + self.offset
        return (normed * _row(scale, x.ndim)).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ w (+ b), with w stored as [in, out]; as int8 [out, in]."""

    def __init__(
        self, path: str, in_size: int, out_size: int, weights: Weights, *, bias: bool = False
    ) -> None:
        self.w: nnx.Param[Any] = nnx.Param(weights(f"{path}.w", (in_size, out_size)))
        self.b = nnx.Param(weights(f"{path}.b", (out_size,))) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Projects the last axis."""
        y = matmul(x, self.w.get_value())
        return y if self.b is None else y + _row(self.b[...], y.ndim)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), as in SwiGLU and GeGLU."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        width, hidden = config.hidden_size, config.mlp_size
        self.gate = Linear(f"{path}.gate", width, hidden, weights)
        self.up = Linear(f"{path}.up", width, hidden, weights)
        self.down = Linear(f"{path}.down", hidden, width, weights)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the network to each token."""
        gate = self.gate(x)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate)
        return self.down(gate * self.up(x))


class Attention(nnx.Module):
    """The projections before and after one call of `attend`."""

    def __init__(self, path: str, config: ModelConfig, weights: Weights) -> None:
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q = Linear(f"{path}.q", width, q_size, weights, bias=config.qkv_bias)
        self.k = Linear(f"{path}.k", width, kv_size, weights, bias=config.qkv_bias)
        self.v = Linear(f"{path}.v", width, kv_size, weights, bias=config.qkv_bias)
        self.o = Linear(f"{path}.o", q_size, width, weights, bias=config.out_bias)

        def head_norm(name: str) -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return RMSNorm(f"{path}.{name}", config.head_dim, config, weights)

        self.q_norm = head_norm("q_norm")
        self.k_norm = head_norm("k_norm")

    def project(
        self, x: Float[Array, "B T D"], angles: Float[Array, "B T 1 H2"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values by head, normalised and rotated.

        Args:
            x: the layer's normalised input.
            angles: rotary angles, from `rope_angles`.
        """
        by_head = (*x.shape[:2], -1, self.head_dim)
        flat = (_whole(project(x)) for project in (self.q, self.k, self.v))
        q, k, v = (y.reshape(by_head) for y in flat)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, angles), rotate(k, angles), v

    def w_o(self, dtype: DTypeLike) -> Float[Array, "N H D"]:
        """The output projection by head."""
        w_o = self.o.w.get_value()
        if isinstance(w_o, QuantArray):
            w_o = dequantize(w_o, dtype).T
        return w_o.reshape(-1, self.head_dim, w_o.shape[-1])

    def output(self, heads: Float[Array, "B T N H"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The update to the residual stream, from what the heads found."""
        return self.o(heads.astype(dtype).reshape(*heads.shape[:2], -1))


def _whole(y: Float[Array, "B T O"]) -> Float[Array, "B T O"]:
    """Keeps XLA on TPU from multiplying by head, for which it copies the weights turned around."""
    return jax.lax.platform_dependent(y, tpu=jax.lax.optimization_barrier, default=lambda y: y)


def _row(vector: Float[Array, " D"], ndim: int) -> Float[Array, "... D"]:
    """Shapes a vector for arithmetic with `ndim` axes, also under strict rank promotion."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
