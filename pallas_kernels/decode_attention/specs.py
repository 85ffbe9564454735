"""Shapes of `decode_attention` that the tests and the benchmark share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from pallas_kernels.decode_attention.reference import NewEntry
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
        sets: of entries in each list, told apart by owners, as budgets by head have them.
        softcap: see the op.
        window: see the op.
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
    sets: int = 1
    softcap: float | None = None
    window: int | None = None
    int8: bool = False
    large: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments; the start is static."""
        stacked = self.layers > 1
        return {
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "window": self.window,
            "sets": self.sets,
            "start": (self.layers - 1) * self.slots if stacked else None,
            "slots": self.slots if stacked else None,
        }

    def shapes(self, dtype: DTypeLike) -> tuple[Any, ...]:
        """Those of `inputs`, of keys and values as `jax.ShapeDtypeStruct`s."""
        entries = (self.batch, self.cache_heads, self.layers * self.slots)
        keys = jax.ShapeDtypeStruct((*entries, self.head_dim), dtype)
        marks = jax.ShapeDtypeStruct(entries, jnp.int32)
        return (
            jax.ShapeDtypeStruct((self.batch, self.heads, self.head_dim), dtype),
            *(jax.eval_shape(self._stored, keys),) * 2,
            marks,
            jax.ShapeDtypeStruct((self.batch,), jnp.int32),
            marks if self.sets > 1 else None,
        )

    def inputs(
        self, dtype: DTypeLike, *, seed: int = 0
    ) -> tuple[Array, Array | QuantArray, Array | QuantArray, Array, Array, Array | None]:
        """q, k, v, positions, query and owners.

        About two thirds of the slots have positions of what came before the query, the others are
        empty or come later; of the first head of the first row all have them. The query of the last
        row of a batch is padding.
        """
        random = np.random.default_rng(seed)

        def normal(like: Any) -> Array:
            return jnp.asarray(random.standard_normal(like.shape, np.float32).astype(dtype))

        q, k, v, marks, _, owners = self.shapes(dtype)
        q, k, v = map(normal, (q, k, v))
        query = np.arange(900, 900 + self.batch, dtype=np.int32)
        if self.batch > 1:
            query[-1] = -1
        before, later = random.integers(0, 900, marks.shape), random.integers(990, 999, marks.shape)
        unseen = np.where(random.random(marks.shape) < 0.5, -1, later)
        positions = np.where(random.random(marks.shape) < 0.67, before, unseen)
        positions[0, 0] = before[0, 0]
        if owners is not None:
            owners = jnp.asarray(random.integers(0, self.sets, owners.shape), jnp.int32)
        places = jnp.asarray(positions, jnp.int32), jnp.asarray(query)
        return q, self._stored(k), self._stored(v), *places, owners

    def new(self, dtype: DTypeLike, *, seed: int = 1) -> NewEntry:
        """A new entry in each row: the first slot in the first, the last in the second, and so on.

        In the last row of a batch there is none.
        """
        shape = (self.batch, self.cache_heads, self.head_dim)
        random = np.random.default_rng(seed)
        stored = (
            self._stored(jnp.asarray(random.standard_normal(shape, np.float32).astype(dtype)))
            for _ in range(2)
        )
        slot = (self.options["start"] or 0) + np.arange(self.batch) * (self.slots - 1) % self.slots
        if self.batch > 1:
            slot[-1] = self.layers * self.slots
        k, v = stored
        return NewEntry(k=k, v=v, slot=jnp.asarray(slot, jnp.int32))

    def _stored(self, x: Array) -> Array | QuantArray:
        return jax.jit(quantize)(x) if self.int8 else x

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.batch * self.heads * self.slots * self.head_dim

    def read_bytes(self, dtype: DTypeLike) -> int:
        """That any implementation reads: keys, values, scales and positions of all slots, once."""
        number = 1 if self.int8 else jnp.dtype(dtype).itemsize
        entry = 2 * (self.head_dim * number + 4 * self.int8) + 4 + 4 * (self.sets > 1)
        return self.batch * self.slots * self.cache_heads * entry


SPECS: tuple[Spec, ...] = (
    Spec(name="mha", heads=3, cache_heads=3, slots=72, head_dim=64, batch=2),
    Spec(name="gqa3", heads=9, cache_heads=3, slots=256, head_dim=64, batch=3, layers=3),
    Spec(name="gqa4_ragged", heads=8, cache_heads=2, slots=333, head_dim=80, batch=2),
    Spec(name="gqa8_int8", heads=8, cache_heads=1, slots=256, head_dim=128, layers=2, int8=True),
    Spec(name="gqa8_96", heads=8, cache_heads=1, slots=130, head_dim=96, softcap=20.0),
    Spec(
        name="mqa_256", heads=4, cache_heads=1, slots=160, head_dim=256, softcap=50.0, batch=3,
        window=400,
    ),
    Spec(name="owners", heads=6, cache_heads=1, slots=384, head_dim=64, sets=3),
    Spec(
        name="owners_int8", heads=4, cache_heads=2, slots=96, head_dim=64, sets=2,
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
