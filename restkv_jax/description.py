"""Trees of this package's dataclasses as JSON, their arrays set apart by name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized import QuantArray
from restkv_jax.allocation import HeadAllocation
from restkv_jax.cache import KVCache
from restkv_jax.decode_loop import DecodeState
from restkv_jax.fingerprint import checksum
from restkv_jax.plan import CachePlan, DecodeEviction
from restkv_jax.policies import POLICIES
from restkv_jax.protocols import LayerSpec
from restkv_jax.slots import LayerStack

Entry = Mapping[str, Any]
"""What stands in JSON for an array: "array" (its name), "shape", "dtype", "checksum", and of
random keys "random_key", the generator's name; the rest is then that of the numbers behind them."""


class DescriptionError(ValueError):
    """A description that cannot be read, or is that of something else."""


def encode(value: Any, name: str, arrays: dict[str, jax.Array]) -> Any:
    """JSON of a tree: objects for dataclasses and arrays, lists for tuples.

    Args:
        value: dataclasses of this package, tuples, arrays, plain values.
        name: of the tree; its arrays are called by their path below it, such as "state.token".
        arrays: filled with the arrays; random keys as the numbers behind them.

    Raises:
        ValueError: something else is in the tree; the message says where.
    """
    if isinstance(value, jax.Array | np.ndarray):
        value, entry = jnp.asarray(value), {"array": name}
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            entry["random_key"] = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        arrays[name] = value
        facts = {"shape": list(value.shape), "dtype": value.dtype.name}
        return {**entry, **facts, "checksum": int(checksum(value))}
    if isinstance(value, tuple):
        return [encode(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    cls = type(value)
    if _classes().get(cls.__name__) is not cls:
        raise ValueError(
            f"{name}: expected plain values, arrays and classes of this package (a policy of your "
            f"own must be in POLICIES), got {cls.__name__}"
        )
    fields = {
        field.name: encode(getattr(value, field.name), f"{name}.{field.name}", arrays)
        for field in dataclasses.fields(value)
    }
    return {"class": cls.__name__, **fields}


def settings(value: Any) -> dict[str, Any]:
    """JSON of a dataclass's fields, of any class; those with other than plain values are left out.

    Args:
        value: a dataclass; its fields may be plain values, dataclasses and lists or tuples of
            both.
    """
    found = {}
    for field in dataclasses.fields(value):
        with contextlib.suppress(TypeError):
            found[field.name] = _plain(getattr(value, field.name))
    return found


def expect(what: str, stored: Any, given: Any) -> None:
    """Refuses what is not as the description says.

    Raises:
        DescriptionError: saying what it is about, what was expected, and what came.
    """
    if stored != given:
        raise DescriptionError(f"{what}: the cache has {stored!r}, got {given!r}")


def decode(node: Any, array: Callable[[Entry], Any] | None = None) -> Any:
    """The tree that `encode` made JSON of.

    Args:
        node: the JSON.
        array: what to put in an array's place; None if there must be none.

    Raises:
        DescriptionError: naming the class or array that cannot be read.
    """
    if isinstance(node, list):
        return tuple(decode(item, array) for item in node)
    if not isinstance(node, dict):
        return node
    what = node.get("class", node.get("array"))
    try:
        if "class" in node:
            fields = {key: decode(item, array) for key, item in node.items() if key != "class"}
            return _classes()[node["class"]](**fields)
        if array is None:
            raise ValueError("no place for an array")
        return array(node)
    except DescriptionError:
        raise
    except KeyError as err:
        raise DescriptionError(f"cannot read {what!r}: {err} is unknown or missing") from err
    except (TypeError, ValueError) as err:
        raise DescriptionError(f"cannot read {what!r}: {err}") from err


def abstract(entry: Entry) -> jax.ShapeDtypeStruct:
    """Shape and type of an array."""
    return jax.eval_shape(lambda x: with_key(x, entry), numbers(entry))


def numbers(entry: Entry) -> jax.ShapeDtypeStruct:
    """Shape and type of what is stored: of random keys the numbers behind them."""
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def with_key(x: jax.Array, entry: Entry) -> jax.Array:
    """The array itself, or the random keys that its numbers stand for."""
    generator = entry.get("random_key")
    return x if generator is None else jax.random.wrap_key_data(x, impl=generator)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"expected plain values and dataclasses, got {type(value).__name__}")
    return {"class": type(value).__name__, **settings(value)}


def _classes() -> dict[str, type]:
    """What a description may name; policies that a caller has added to `POLICIES` too."""
    known: list[type] = [KVCache, LayerStack, QuantArray, DecodeState, DecodeEviction]
    known += [CachePlan, LayerSpec, *POLICIES.values(), *_subclasses(HeadAllocation)]
    return {cls.__name__: cls for cls in known}


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
