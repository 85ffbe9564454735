"""Shapes of `masked_eviction` that the tests and the benchmark share."""

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
        batch: B; the last of several rows has less room than slots.
        sets: J.
        kv_heads: K.
        columns: T.
        capacity: C.
        head_dim: H.
        int8: keys and values as int8.
        large: too large for a test on CPU.
    """

    name: str
    batch: int = 1
    sets: int
    kv_heads: int
    columns: int
    capacity: int
    head_dim: int
    int8: bool = False
    large: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return {"capacity": self.capacity}

    def shapes(self, dtype: DTypeLike) -> tuple[Any, ...]:
        """Those of `inputs`."""
        keys = (self.batch, self.kv_heads, self.columns)
        entries = jax.ShapeDtypeStruct((*keys, self.head_dim), dtype)
        if self.int8:
            entries = jax.eval_shape(quantize, entries)
        return (
            jax.ShapeDtypeStruct((self.batch, self.sets, self.columns), jnp.float32),
            *(entries,) * 2,
            jax.ShapeDtypeStruct(keys, jnp.int32),
            jax.ShapeDtypeStruct((self.batch,), jnp.int32),
        )

    def inputs(
        self, dtype: DTypeLike, *, seed: int = 0
    ) -> tuple[Array, Array | QuantArray, Array | QuantArray, Array, Array]:
        """The op's arrays: a third of the columns are pinned, empty or tied, all in the first set.

        Of the last set of several, all columns are empty. Zeros have either sign, which ties.
        """
        r = np.random.default_rng(seed)
        importance = r.standard_normal((self.batch, self.sets, self.columns), np.float32)
        choices = np.asarray([np.inf, -np.inf, 0.0, -0.0, 1.5, -1.5], np.float32)
        special = r.choice(choices, importance.shape)
        importance = np.where(r.random(importance.shape) < 0.33, special, importance)
        importance[0, 0] = special[0, 0]
        if self.sets > 1:
            importance[-1, -1] = -np.inf
        shape = (self.batch, self.kv_heads, self.columns, self.head_dim)
        k, v = (jnp.asarray(r.standard_normal(shape, np.float32), dtype) for _ in range(2))
        budget = np.full(self.batch, self.capacity)
        if self.batch > 1:
            budget[-1] = self.capacity // 3
        places = np.broadcast_to(np.arange(self.columns), shape[:3])
        return (
            jnp.asarray(importance),
            *((quantize(k), quantize(v)) if self.int8 else (k, v)),
            jnp.asarray(places + 70_000, jnp.int32),
            jnp.asarray(budget, jnp.int32),
        )

    @property
    def flops(self) -> int:
        """None: it compares and moves."""
        return 0

    def read_bytes(self, dtype: DTypeLike) -> int:
        """That any implementation moves: all scores once, what stays twice."""
        number = 1 if self.int8 else jnp.dtype(dtype).itemsize
        entry = 2 * (self.head_dim * number + 4 * self.int8) + 4
        return self.batch * self.sets * (4 * self.columns + 2 * self.capacity * entry)


SPECS: tuple[Spec, ...] = (
    Spec(name="by_head", batch=2, sets=2, kv_heads=2, columns=700, capacity=41, head_dim=64),
    Spec(name="by_query_head", sets=4, kv_heads=2, columns=300, capacity=128, head_dim=80),
    Spec(name="all_stay", sets=3, kv_heads=1, columns=90, capacity=120, head_dim=96),
    Spec(name="one_slot", batch=2, sets=2, kv_heads=2, columns=256, capacity=1, head_dim=128),
    Spec(name="decode_256", sets=1, kv_heads=1, columns=384, capacity=256, head_dim=256),
    Spec(
        name="decode_int8", batch=2, sets=2, kv_heads=2, columns=260, capacity=130, head_dim=64,
        int8=True,
    ),
    # Llama-3.1-8B.
    Spec(
        name="8b_128k", sets=8, kv_heads=8, columns=131072, capacity=1024, head_dim=128, large=True
    ),
    Spec(
        name="8b_decode", batch=16, sets=8, kv_heads=8, columns=1152, capacity=1024, head_dim=128,
        large=True,
    ),
)  # fmt: skip
