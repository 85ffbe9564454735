"""Shapes of `decode_attention` that the tests and the benchmark share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from pallas_kernels.quantized import QuantArray, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call of the op.

    Attributes:
        name: of the spec.
        batch: B.
        heads: N.
        cache_heads: J.
        slots: S.
        head_dim: H.
        layers: layers of S slots in one array; the last of them is read.
        by_query_head: marks by query head, entries with owners, as budgets by head have them.
        softcap: see the op.
        int8: keys and values as int8.
        large: too large for a test on CPU.
    """

    name: str
    batch: int = 1
    heads: int
    cache_heads: int
    slots: int
    head_dim: int
    layers: int = 1
    by_query_head: bool = False
    softcap: float | None = None
    int8: bool = False
    large: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments; the start is static."""
        start = None if self.layers == 1 else (self.layers - 1) * self.slots
        return {"scale": self.head_dim**-0.5, "softcap": self.softcap, "start": start}

    def shapes(self, dtype: DTypeLike) -> tuple[Any, Any, Any, jax.ShapeDtypeStruct]:
        """Those of `inputs`, of keys and values as `jax.ShapeDtypeStruct`s."""
        keys = (self.batch, self.cache_heads, self.layers * self.slots, self.head_dim)
        rows = self.heads if self.by_query_head else self.cache_heads
        return (
            jax.ShapeDtypeStruct((self.batch, self.heads, self.head_dim), dtype),
            *(jax.eval_shape(self._stored, jax.ShapeDtypeStruct(keys, dtype)),) * 2,
            jax.ShapeDtypeStruct((self.batch, rows, self.slots), bool),
        )

    def inputs(
        self, dtype: DTypeLike, *, seed: int = 0
    ) -> tuple[Array, Array | QuantArray, Array | QuantArray, Array]:
        """q, k, v and visible.

        About two thirds of the slots are visible; of the last row of a batch none are, of the
        first head of the first row all.
        """
        random = np.random.default_rng(seed)

        def normal(like: Any) -> Array:
            return jnp.asarray(random.standard_normal(like.shape, np.float32).astype(dtype))

        q, k, v, seen = self.shapes(dtype)
        q, k, v = map(normal, (q, k, v))
        visible = random.random(seen.shape) < 0.67
        if self.batch > 1:
            visible[-1] = False
        visible[0, 0] = True
        return q, self._stored(k), self._stored(v), jnp.asarray(visible)

    def _stored(self, x: Array) -> Array | QuantArray:
        return jax.jit(quantize)(x) if self.int8 else x

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.batch * self.heads * self.slots * self.head_dim

    def read_bytes(self, dtype: DTypeLike) -> int:
        """That any implementation reads: keys, values, scales and marks of all slots, once."""
        number = 1 if self.int8 else jnp.dtype(dtype).itemsize
        entry = 2 * (self.head_dim * number + 4 * self.int8)
        marks = self.heads if self.by_query_head else self.cache_heads
        return self.batch * self.slots * (self.cache_heads * entry + marks)


SPECS: tuple[Spec, ...] = (
    Spec(name="mha", heads=3, cache_heads=3, slots=72, head_dim=64, batch=2),
    Spec(name="gqa3", heads=9, cache_heads=3, slots=256, head_dim=64, batch=2, layers=3),
    Spec(name="gqa4_ragged", heads=8, cache_heads=2, slots=333, head_dim=80, batch=2),
    Spec(name="gqa8_int8", heads=8, cache_heads=1, slots=256, head_dim=128, layers=2, int8=True),
    Spec(name="gqa8_96", heads=8, cache_heads=1, slots=130, head_dim=96, softcap=20.0),
    Spec(name="mqa_256", heads=4, cache_heads=1, slots=160, head_dim=256, softcap=50.0, batch=2),
    Spec(name="owners", heads=6, cache_heads=1, slots=384, head_dim=64, by_query_head=True),
    Spec(
        name="owners_int8", heads=4, cache_heads=2, slots=96, head_dim=64, by_query_head=True,
        int8=True, batch=2,
    ),
    Spec(name="one_slot", heads=4, cache_heads=4, slots=1, head_dim=64, batch=2),
    # Llama-3.1-8B: a budget of 1,024 and 128 new tokens, alone and 16 rows; the full cache.
    Spec(name="8b_1024", heads=32, cache_heads=8, slots=1152, head_dim=128, layers=32, large=True),
    Spec(
        name="8b_1024_x16", heads=32, cache_heads=8, slots=1152, head_dim=128, layers=8, batch=16,
        large=True,
    ),
    Spec(
        name="8b_1024_int8", heads=32, cache_heads=8, slots=1152, head_dim=128, layers=8, batch=16,
        int8=True, large=True,
    ),
    Spec(name="8b_32k", heads=32, cache_heads=8, slots=32768, head_dim=128, large=True),
)  # fmt: skip
