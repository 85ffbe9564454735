"""Shapes of `window_scores` that the tests and the benchmark share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from pallas_kernels.window_scores.form import Kind, ScoreForm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call of the op.

    Attributes:
        name: of the spec.
        kind: of score.
        batch: B; the last of several rows holds fewer tokens than the window.
        heads: N.
        kv_heads: K.
        window: W.
        columns: T; all but the last `recent` are scored.
        head_dim: H.
        by_head: positions by key head, with holes, as a cache has them.
        softcap: see the op.
        sliding_window: see the op.
        maximum: over the queries instead of an average.
        options: further fields of the form.
        recent: W by default.
        large: too large for a test on CPU.
    """

    name: str
    kind: Kind = "aggregated"
    batch: int = 1
    heads: int
    kv_heads: int
    window: int
    columns: int
    head_dim: int
    by_head: bool = False
    softcap: float | None = None
    sliding_window: int | None = None
    maximum: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    recent: int | None = None
    large: bool = False

    @property
    def form(self) -> ScoreForm:
        """The op's static argument."""
        return ScoreForm(
            kind=self.kind,
            past=self.columns - (self.window if self.recent is None else self.recent),
            scale=self.head_dim**-0.5,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            **dict(self.options),
        )

    def shapes(self, dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Those of `inputs`."""
        keys = (self.batch, self.kv_heads, self.columns, self.head_dim)
        places = (self.batch, self.kv_heads if self.by_head else 1, self.columns)
        return (
            jax.ShapeDtypeStruct((self.batch, self.heads, self.window, self.head_dim), dtype),
            *(jax.ShapeDtypeStruct(keys, dtype),) * 2,
            jax.ShapeDtypeStruct((self.heads, self.head_dim, self.head_dim), jnp.float32),
            None if self.maximum else jax.ShapeDtypeStruct((self.window,), jnp.float32),
            jax.ShapeDtypeStruct((self.batch, self.window), jnp.int32),
            jax.ShapeDtypeStruct(places, jnp.int32),
        )

    def inputs(
        self, dtype: DTypeLike, *, seed: int = 0
    ) -> tuple[Array, Array, Array, Array, Array | None, Array, Array]:
        """The op's arrays; values of what holds no token are finite."""
        r = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return r.standard_normal(shape, np.float32)

        shape = (self.batch, self.kv_heads, self.columns, self.head_dim)
        q = 2 * draw(self.batch, self.heads, self.window, self.head_dim)
        k, v = draw(*shape), draw(*shape)
        factor = draw(self.heads, self.head_dim, self.head_dim)
        factor *= (self.heads * self.head_dim) ** -0.5
        age = np.arange(self.window)[::-1]
        mean = np.where(age == self.window - 1, 1.0, 0.3) * 0.7**age
        lengths = np.full(self.batch, self.columns)
        if self.batch > 1:
            lengths[-1] = max(self.window - 3, 1)
        places = (np.arange(self.columns) - (self.columns - lengths[:, None]))[:, None]
        if self.by_head:
            places = np.where(r.random(shape[:3]) < 0.67, places, -1)
        queries = lengths[:, None] - self.window + np.arange(self.window)
        return (
            jnp.asarray(q, dtype),
            jnp.asarray(k, dtype),
            jnp.asarray(v, dtype),
            jnp.asarray(factor),
            None if self.maximum else jnp.asarray(mean, jnp.float32),
            jnp.asarray(queries, jnp.int32),
            jnp.asarray(places, jnp.int32),
        )

    @property
    def flops(self) -> int:
        """Of the products: logits twice, outputs, and distances after projection."""
        by_key = 4 * self.window * self.head_dim
        if self.kind != "attention":
            by_key += 2 * self.window * self.head_dim + 2 * self.head_dim**2
        if self.kind == "per_query":
            by_key += 3 * self.window * self.head_dim
        return self.batch * self.heads * self.columns * by_key

    def read_bytes(self, dtype: DTypeLike) -> int:
        """That any implementation moves: the keys and values twice, the scores once."""
        entry = 2 * self.head_dim * jnp.dtype(dtype).itemsize * (1 + (self.kind != "attention"))
        return self.batch * self.columns * (self.kv_heads * entry + 4 * self.heads)


SPECS: tuple[Spec, ...] = (
    Spec(name="mha_64", heads=2, kv_heads=2, window=8, columns=300, head_dim=64, batch=2, recent=1),
    Spec(
        name="gqa3_80", heads=6, kv_heads=2, window=20, columns=140, head_dim=80, by_head=True,
        softcap=20.0, options=(("tau", 0.5),),
    ),
    Spec(
        name="gqa4_96", kind="per_query", heads=4, kv_heads=1, window=8, columns=261, head_dim=96,
        batch=2, sliding_window=100, options=(("relative", True), ("power", 2.0)),
    ),
    Spec(
        name="gqa8_128", kind="per_query", heads=8, kv_heads=1, window=4, columns=128,
        head_dim=128, by_head=True,
    ),
    Spec(
        name="max_64", kind="per_query", heads=3, kv_heads=1, window=16, columns=130, head_dim=64,
        maximum=True,
    ),
    Spec(name="wide_256", heads=2, kv_heads=1, window=1, columns=150, head_dim=256, softcap=50.0),
    Spec(
        name="attention", kind="attention", heads=6, kv_heads=2, window=8, columns=300,
        head_dim=64, batch=2, sliding_window=200,
    ),
    Spec(
        name="attention_max", kind="attention", heads=8, kv_heads=1, window=5, columns=90,
        head_dim=64, maximum=True, by_head=True,
    ),
    # Llama-3.1-8B.
    Spec(name="8b_8k", heads=32, kv_heads=8, window=32, columns=8192, head_dim=128, large=True),
    Spec(name="8b_128k", heads=32, kv_heads=8, window=32, columns=131072, head_dim=128, large=True),
    Spec(
        name="8b_128k_paper", kind="per_query", heads=32, kv_heads=8, window=32, columns=131072,
        head_dim=128, large=True,
    ),
    Spec(
        name="8b_128k_attention", kind="attention", heads=32, kv_heads=8, window=32,
        columns=131072, head_dim=128, large=True,
    ),
)  # fmt: skip
