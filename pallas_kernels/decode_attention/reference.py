"""Attention of one new token over the cache's slots, in plain XLA.

Float32 is multiplied as float32, which TPUs and GPUs would round to bfloat16 and TF32 by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantized import QuantArray
from pallas_kernels.slot_write.reference import write_slots_xla

Tree = TypeVar("Tree")


class Entries(NamedTuple):
    """Keys, values and positions of a cache's slots, or of one entry without T.

    Attributes:
        k: [B, J, T, H].
        v: [B, J, T, H].
        positions: int32 [B, J, T].
    """

    k: Float[Array, "B J *T H"] | QuantArray
    v: Float[Array, "B J *T H"] | QuantArray
    positions: Int[Array, "B J *T"]

    def arrays(self) -> tuple[Array, ...]:
        """Keys, values and positions, then the scales of int8, if there are any."""
        if isinstance(self.k, QuantArray) and isinstance(self.v, QuantArray):
            return self.k.values, self.v.values, self.positions, self.k.scale, self.v.scale
        assert not isinstance(self.k, QuantArray)
        assert not isinstance(self.v, QuantArray)
        return self.k, self.v, self.positions

    @staticmethod
    def of(arrays: Sequence[Array]) -> Entries:
        """The inverse of `arrays`."""
        k, v, positions, *scales = arrays
        if not scales:
            return Entries(k, v, positions)
        k_scale, v_scale = scales
        return Entries(
            QuantArray(values=k, scale=k_scale), QuantArray(values=v, scale=v_scale), positions
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewEntry:
    """The new token of each row, to be written before its query looks.

    Attributes:
        k: [B, J, H] its key, as the cache stores it.
        v: [B, J, H] its value.
        slot: int32 [B] where along T it goes, one of the layer's; T for a row without one.
    """

    k: Float[Array, "B J H"] | QuantArray
    v: Float[Array, "B J H"] | QuantArray
    slot: Int[Array, " B"]

    def at(self, query: Int[Array, " B"]) -> Entries:
        """With the positions of the queries."""
        return Entries(self.k, self.v, jnp.broadcast_to(query[:, None], self.k.shape[:2]))


def decode_attention_xla(
    q: Float[Array, "B N H"],
    k: Float[Array, "B J T H"] | QuantArray,
    v: Float[Array, "B J T H"] | QuantArray,
    positions: Int[Array, "B J T"],
    query: Int[Array, " B"],
    owners: Int[Array, "B J T"] | None = None,
    new: NewEntry | None = None,
    start: int | Int[Array, ""] | None = None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sets: int,
    slots: int | None,
    weights: bool,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N S"] | None, Entries | None]:
    """See `pallas_kernels.decode_attention.decode_attention`; logits and sums in float32."""
    written = None
    if new is not None:
        # Reading what was just written, and nothing older, lets XLA write in place.
        written = k, v, positions = write(Entries(k, v, positions), query, new)
    k, v, positions, owners = layer_of((k, v, positions, owners), start, slots)
    batch, heads, size = q.shape
    cache_heads, group = k.shape[1], heads // k.shape[1]
    seen = visible(positions, query[:, None], owners, window=window, sets=sets, group=group)
    grouped = q.reshape(batch, cache_heads, group, size)  # [B, J, G, H]
    product = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    logits = scale * product("bjgh,bjsh->bjgs", grouped, _numbers(k, q))
    if isinstance(k, QuantArray):
        logits *= k.scale[:, :, None]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen.reshape(batch, cache_heads, -1, k.shape[2]), logits, -jnp.inf)
    numerators, total = softmax(logits)
    values = _numbers(v, q)
    scaled = numerators * v.scale[:, :, None] if isinstance(v, QuantArray) else numerators
    out = product("bjgs,bjsh->bjgh", scaled.astype(values.dtype), values)
    out = (out / total).reshape(q.shape).astype(q.dtype)
    shares = (numerators / total).reshape(batch, heads, -1) if weights else None
    return out, shares, written


def visible(
    positions: Int[Array, "B J S"],
    query: Int[Array, "B Q"],
    owners: Int[Array, "B J S"] | None = None,
    *,
    window: int | None,
    sets: int,
    group: int,
) -> Bool[Array, "B M Q S"]:
    """True for the slots that a query may look at.

    Args:
        positions: of the entries, -1 for an empty slot.
        query: positions of the queries, negative for padding, which sees nothing.
        owners: which of the sets in its list each entry belongs to, or None.
        window: how many positions a query sees, its own the last; None for all.
        sets: of each list.
        group: query heads that look at a list, as many for each of its sets.

    Returns:
        By list (M = J), or by query head if the entries have owners (M = J · group).
    """
    distance = query[:, None, :, None] - positions[:, :, None]
    seen = (positions[:, :, None] >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    if owners is None:
        return seen
    set_of = jnp.arange(group, dtype=jnp.int32) // (group // sets)
    own = owners[:, :, None] == set_of[:, None]  # [B, J, G, S]
    by_head = seen[:, :, None] & own[:, :, :, None]
    return by_head.reshape(seen.shape[0], -1, *seen.shape[2:])


def write(
    cache: Entries,
    query: Int[Array, " B"],
    new: NewEntry,
    write_slots: Callable[..., tuple[Array, ...]] = write_slots_xla,
) -> Entries:
    """The cache with the new entries in it; `write_slots` is one of that op's implementations."""
    entries = tuple(x[:, None] for x in new.at(query).arrays())
    return Entries.of(write_slots(cache.arrays(), entries, new.slot[:, None]))


def softmax(logits: Float[Array, "... S"]) -> tuple[Float[Array, "... S"], Float[Array, "... 1"]]:
    """Numerators and denominator of the softmax; 0 and 1 where all logits are -inf."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    numerators = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(numerators, axis=-1, keepdims=True)
    return numerators, jnp.where(total == 0.0, 1.0, total)


def layer_of(stack: Tree, start: int | Int[Array, ""] | None, slots: int | None) -> Tree:
    """The slots of one layer, cut out of arrays that hold those of many along axis 2."""
    if start is None or slots is None:
        return stack
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, slots, axis=2), stack)


def _numbers(x: Array | QuantArray, like: Array) -> Array:
    # Levels of int8 are exact in bfloat16 and float32 alike.
    return x.values.astype(like.dtype) if isinstance(x, QuantArray) else x
