"""Short names for exact values: of a model's weights, of one array."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from restkv_jax.factors import FactoredLM
from restkv_jax.protocols import CausalLM
from restkv_jax.sharding import ShardedLM


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """32 bits that depend on every bit of an array and on where it is.

    A sum of whole numbers, so that neither the device nor how the array is sharded plays a part.

    Args:
        x: numbers or truth values of any shape; no random keys.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(place)), dtype=jnp.uint32)


def bare(model: CausalLM) -> CausalLM:
    """The model itself, without what `with_output_factors` and `shard` put around it."""
    while isinstance(model, FactoredLM | ShardedLM):
        model = model.model
    return model


def weights_fingerprint(model: CausalLM) -> str:
    """16 hexadecimal digits of all weights: shapes, types and every value.

    Neither factors that were added by `with_output_factors` count nor a mesh, see `bare`.
    """
    leaves = jax.tree.leaves(bare(model))
    digest = hashlib.sha256()
    for leaf, bits in zip(leaves, jax.device_get([checksum(leaf) for leaf in leaves]), strict=True):
        digest.update(f"{leaf.shape}{leaf.dtype}{bits}".encode())
    return digest.hexdigest()[:16]


def _mix(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain): each bit moves half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
