"""A caller's own model: a parameter dictionary behind the `CausalLM` protocol, no flax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from restkv_jax.decode import LayerSpec

# For tests of what a compiled program holds: in all others XLA is told to be quick.
OPTIMISED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_backend_extra_options": "",
}


def rotary(size: int) -> tuple[float, ...]:
    half = size // 2
    return tuple(10_000.0 ** (-i / half) for i in range(half))


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    rates = jnp.asarray(rotary(x.shape[-1]), jnp.float32)
    angle = jnp.maximum(positions, 0)[:, :, None, None] * rates[None, None, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    ).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyModel:
    """Attention and a nonlinearity per layer."""

    params: dict[str, jax.Array]
    layer_specs: tuple[LayerSpec, ...] = dataclasses.field(metadata={"static": True})

    @property
    def kv_dtype(self):
        return self.params["k"].dtype

    def __call__(self, tokens, positions, attend, state):
        x = self.params["embed"][tokens]
        for layer, spec in enumerate(self.layer_specs):
            p = {name: self.params[name][layer] for name in ("q", "k", "v", "o", "mlp")}
            h = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
            shape = (*tokens.shape, -1, spec.head_dim)
            q, k = (rotate((h @ p[name]).reshape(shape), positions) for name in "qk")
            out, state = attend(layer, q, k, (h @ p["v"]).reshape(shape), p["o"], state)
            x = x + jnp.einsum("btnh,nhd->btd", out, p["o"])
            x = x + jnp.tanh(x @ p["mlp"])
        return x, state

    def unembed(self, hidden):
        return hidden @ self.params["head"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScannedModel(TinyModel):
    """The same, in a scan over its layers."""

    def __call__(self, tokens, positions, attend, state):
        layers = {name: self.params[name] for name in ("q", "k", "v", "o", "mlp")}

        def body(carry, layer):
            x, state = carry
            index, p = layer
            spec = self.layer_specs[0]
            h = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
            shape = (*tokens.shape, -1, spec.head_dim)
            q, k = (rotate((h @ p[n]).reshape(shape), positions) for n in "qk")
            out, state = attend(index, q, k, (h @ p["v"]).reshape(shape), p["o"], state)
            x = x + jnp.einsum("btnh,nhd->btd", out, p["o"])
            return (x + jnp.tanh(x @ p["mlp"]), state), None

        start = self.params["embed"][tokens], state
        indices = jnp.arange(len(self.layer_specs))
        return jax.lax.scan(body, start, (indices, layers))[0]


def make(
    *, layers=2, heads=4, kv_heads=2, size=8, width=24, vocab=61, seed=0, peak=2.0, **spec
) -> TinyModel:
    keys = iter(jax.random.split(jax.random.key(seed), 7))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    params = {
        "embed": normal(vocab, width),
        "q": normal(layers, width, heads * size, scale=peak * width**-0.5),
        "k": normal(layers, width, kv_heads * size, scale=width**-0.5),
        "v": normal(layers, width, kv_heads * size, scale=width**-0.5),
        "o": normal(layers, heads, size, width, scale=(heads * size) ** -0.5),
        "mlp": normal(layers, width, width, scale=width**-0.5),
        "head": normal(width, vocab, scale=width**-0.5),
    }
    one = LayerSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        scale=size**-0.5,
        rotary=rotary(size),
        **spec,
    )
    return TinyModel(params, (one,) * layers)


def cast(model: TinyModel, dtype: DTypeLike) -> TinyModel:
    """The same weights in another type."""
    return dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), model.params))


def with_windows(model: TinyModel, windows: tuple[int | None, ...]) -> TinyModel:
    """The same weights, with a sliding window (or none) for each layer."""
    specs = zip(model.layer_specs, windows, strict=True)
    return dataclasses.replace(
        model,
        layer_specs=tuple(dataclasses.replace(spec, window=window) for spec, window in specs),
    )
