"""Caches of several rows, filled by any policies, as one cache to decode from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from restkv_jax.cache import KVCache
from restkv_jax.slots import LayerStack

# Where the rows are in a stack's arrays.
_BATCH_AXIS = {
    "k": 0,
    "v": 0,
    "positions": 0,
    "owners": 0,
    "carried": 0,
    "used": 1,
    "queries": 1,
}


def form_of(cache: KVCache) -> Hashable:
    """What caches must have alike for `join_rows`: all that is static but the number of rows.

    Which policy filled a cache does not matter; the slots of its layers do, how they are stored,
    and what happens when they are full.
    """

    def without(axis: int, leaf: Array) -> Hashable:
        return (*leaf.shape[:axis], *leaf.shape[axis + 1 :]), leaf.dtype

    return jax.tree.structure(cache), tuple(
        without(axis, leaf)
        for stack in cache.stacks
        for name, axis in _BATCH_AXIS.items()
        for leaf in jax.tree.leaves(getattr(stack, name))
    )


def join_rows(caches: Sequence[KVCache]) -> KVCache:
    """One cache with the rows of several, in their order, so that they are decoded from at once.

    Args:
        caches: at least one, all of one form; they stay as they are.

    Raises:
        ValueError: none, or caches of several forms.
    """
    if not caches:
        raise ValueError("caches: expected at least one")
    for i, cache in enumerate(caches):
        if form_of(cache) != form_of(caches[0]):
            raise ValueError(
                f"caches: expected caches of one form, number {i} differs from number 0 in the "
                "slots of its layers, in how they are stored, or in what happens when it is full"
            )
    return dataclasses.replace(
        caches[0],
        stacks=tuple(_join(stacks) for stacks in zip(*(c.stacks for c in caches), strict=True)),
        next_position=jnp.concatenate([cache.next_position for cache in caches]),
    )


def _join(stacks: Sequence[LayerStack]) -> LayerStack:
    def join(axis: int, *parts: Array) -> Array:
        return jnp.concatenate(parts, axis)

    joined = {
        name: jax.tree.map(functools.partial(join, axis), *(getattr(s, name) for s in stacks))
        for name, axis in _BATCH_AXIS.items()
    }
    return dataclasses.replace(stacks[0], **joined)
