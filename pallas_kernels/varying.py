"""Which axes of a mesh arrays differ along, for those who ask inside of a `jax.shard_map`.

Its check (`check_vma`) takes constants and what kernels write for arrays that are equal on all
devices, and refuses a loop that starts from the one and ends in another. What is made here says
along which axes it differs: those along which what it is computed from does. Outside of a
`shard_map`, and without the check, there are no such axes and nothing is done.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.sharding import ManualAxisType

Tree = TypeVar("Tree")
Shapes = TypeVar("Shapes")


def varying_axes(tree: Any) -> frozenset[str]:
    """Axes along which any of the arrays differs; none without the check."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    )


def vary_like(tree: Tree, *like: Any) -> Tree:
    """The same arrays, differing along all axes along which any of `like` does."""
    axes = varying_axes(like)

    def vary(x: Any) -> Any:
        missing = axes - varying_axes(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def outputs_like(shapes: Shapes, *like: Any) -> Shapes:
    """Shapes of what a kernel writes, computed from `like`."""
    kind = ManualAxisType(varying=varying_axes(like))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind), shapes
    )
