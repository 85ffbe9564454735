"""Where the weights of a network go on a mesh: the table of their logical axes.

A row of q, k and v belongs to one head, and so does a column of o; the widths of the MLP are
independent of one another as well. Split like this, a layer needs two all-reduces, one behind
each of the projections that lead back to the residual stream.
"""

from __future__ import annotations

import re

import jax

from models.int8_weights import place_int8
from models.registry import make_network
from models.weights import Network, Sharding, named_parameters
from pallas_kernels.quantized import QuantArray
from restkv_jax.mesh_rules import MeshRules

# Logical axes of each parameter, [in, out] for projections. Those of norms are on every device.
_TOP = {
    "embed.w": ("vocab", None),
    "head.w": (None, "vocab"),
}
_LAYER = {
    "attn.q.w": (None, "query_heads"),
    "attn.q.b": ("query_heads",),
    "attn.k.w": (None, "kv_heads"),
    "attn.k.b": ("kv_heads",),
    "attn.v.w": (None, "kv_heads"),
    "attn.v.b": ("kv_heads",),
    "attn.o.w": ("query_heads", None),
    "mlp.gate.w": (None, "mlp"),
    "mlp.up.w": (None, "mlp"),
    "mlp.down.w": ("mlp", None),
}


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of a parameter, e.g. of "layers.0.attn.q.w"; () if it is not split."""
    match = re.fullmatch(r"layers\.\d+\.(.+)", path)
    return _TOP.get(path, ()) if match is None else _LAYER.get(match[1], ())


def weight_sharding(rules: MeshRules) -> Sharding:
    """Where each parameter goes, for `models.load`.

    Args:
        rules: the mesh and its table. A vocabulary or a width of the MLP that cannot be split
            evenly is left whole; heads must split evenly, see `restkv_jax.sharding.shard`.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        axes = [
            axis if axis not in ("vocab", "mlp") or size % rules.shards(axis) == 0 else None
            for axis, size in zip(logical_axes(path), shape, strict=False)
        ]
        return rules.sharding(*axes)

    return sharding


def place_weights(model: Network, rules: MeshRules) -> Network:
    """A copy of a model, its weights where the table says."""
    parameters, sharding = named_parameters(model), weight_sharding(rules)

    def placed(path: str, shape: tuple[int, ...]) -> jax.Array | QuantArray:
        value, target = parameters[path], sharding(path, shape)
        if isinstance(value, QuantArray):
            return place_int8(path, value, target)
        return jax.device_put(value, target)

    network = make_network(model.config, placed)
    assert isinstance(network, type(model))
    return network
