"""Checks a checkpoint as a whole against a network, then builds the network from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError
from models.int8_weights import as_stored, float_dtype, place_int8
from models.names import Source
from models.registry import make_network
from pallas_kernels.quantized import QuantArray

Network = TypeVar("Network", bound=Decoder)

_SHOWN_PROBLEMS = 8
_ALIGNMENT = 64  # bytes, of buffers of XLA on CPU

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
"""From a parameter's path, e.g. "layers.0.attn.q.w" ([in, out]), and shape to where it goes; None
for the default device."""


class TensorStore(Protocol):
    """A checkpoint's tensors, read one at a time."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype it is stored in (dequantised if need be)."""
        ...


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each parameter of the network, allocating none."""
    shapes = {}

    def record(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        shapes[path] = shape
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    make_network(config, record)
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """A checkpoint that was found to fit a network, by the network's parameters.

    Attributes:
        config: the network.
        store: the checkpoint.
        shapes: path -> shape of each parameter.
        sources: path -> the tensor that it comes from.
    """

    config: ModelConfig
    store: TensorStore
    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, Source]

    def read(self, path: str) -> np.ndarray:
        """One parameter in the dtype it is stored in, of the shape that the network wants."""
        source = self.sources[path]
        return source.convert(self.store.read(source.name))


def match(
    config: ModelConfig,
    store: TensorStore,
    source_of: Callable[[str, ModelConfig], Source],
    *,
    ignored: Collection[str] = (),
) -> Parameters:
    """Finds each parameter of a network in a checkpoint, reading none but a head that is tied.

    Args:
        config: the network.
        store: the checkpoint.
        source_of: from a parameter's path to its tensor, see `models.names`.
        ignored: tensors that the network has no place for, and that may be there.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; every such problem
            is in the message.
    """
    shapes = parameter_shapes(config)
    sources = {path: source_of(path, config) for path in shapes}
    spare_head = _spare_head(config, store, source_of)
    _check_names_and_shapes(shapes, sources, store, ignored={*ignored, spare_head})
    if spare_head is not None:
        _check_tie(sources["embed.w"].name, spare_head, store)
    return Parameters(config=config, store=store, shapes=shapes, sources=sources)


def build(parameters: Parameters, dtype: DTypeLike, sharding: Sharding | None = None) -> Decoder:
    """Builds the network with the weights of a checkpoint.

    Tensors are read, turned, cast and placed one at a time.

    Args:
        parameters: of the checkpoint, see `match`.
        dtype: of the weights in memory; int8 of matrices, beside which all else is bfloat16.
        sharding: where each parameter goes.

    Returns:
        The model.

    Raises:
        CheckpointError: tensors are not finite; all such are in the message.
        ValueError: a sharding does not fit its parameter.
    """
    targets = shardings_of(parameters.shapes, sharding)
    finite: dict[str, jax.Array] = {}

    def weights(path: str, shape: tuple[int, ...]) -> jax.Array | QuantArray:
        value = _place(parameters.read(path), float_dtype(shape, dtype), targets[path])
        finite[parameters.sources[path].name] = all_finite(value)
        stored = as_stored(path, value, dtype)
        if isinstance(stored, QuantArray):
            stored = place_int8(path, stored, targets[path])
        # Waited for, so that a matrix of floats is gone before the next one comes.
        return jax.block_until_ready(stored)

    model = make_network(parameters.config, weights)
    raise_unless_finite(parameters.store.path, finite)
    return model


def weights_bytes(model: nnx.Module) -> int:
    """Memory that the model's weights take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def named_parameters(model: Decoder) -> dict[str, Any]:
    """Path -> value of each parameter, by the paths that `Weights` functions are asked for.

    The values are arrays, or matrices of int8.
    """
    paths: list[str] = []

    def number(path: str, _: tuple[int, ...]) -> jax.Array:
        paths.append(path)
        return jnp.asarray(len(paths) - 1)

    order = jax.tree.leaves(make_network(model.config, number))
    values = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QuantArray))
    return dict(zip([paths[int(i)] for i in order], values, strict=True))


def quantize_weights(model: Network) -> Network:
    """The model with its matrices as int8, see `models.int8_weights`; all else stays as it is.

    Raises:
        ValueError: they are int8 already.
    """
    values = named_parameters(model)
    if any(isinstance(value, QuantArray) for value in values.values()):
        raise ValueError("model: expected weights of floats, got int8")

    def weights(path: str, shape: tuple[int, ...]) -> jax.Array | QuantArray:
        return as_stored(path, values[path], jnp.int8) if len(shape) == 2 else values[path]

    network = make_network(model.config, weights)
    assert isinstance(network, type(model))
    return network


def shardings_of(
    shapes: Mapping[str, tuple[int, ...]], sharding: Sharding | None
) -> dict[str, jax.sharding.Sharding | None]:
    """Path -> where each parameter goes.

    Raises:
        ValueError: a sharding does not fit its parameter.
    """
    found = {path: sharding and sharding(path, shape) for path, shape in shapes.items()}
    for path, target in found.items():
        if target is not None:
            try:
                target.shard_shape(shapes[path])
            except (IndexError, ValueError) as err:
                raise ValueError(
                    f"sharding: {path} of shape {list(shapes[path])} cannot be split by {target}"
                ) from err
    return found


def raise_unless_finite(path: Path, finite: Mapping[str, jax.Array]) -> None:
    """Raises `CheckpointError` about the tensors of `path` that are not; given name -> answer.

    All answers are asked for together, at the end: each one is a wait for the device.
    """
    bad = [f"{name} holds NaN or infinity" for name, ok in finite.items() if not bool(ok)]
    raise_problems(path, bad)


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite.

    0 x is NaN exactly there. A sum is computed as it goes; asking each element first would take
    an array of answers.
    """
    return jnp.isfinite(jnp.sum(0 * x, dtype=jnp.float32))


def _place(tensor: np.ndarray, dtype: DTypeLike, target: jax.sharding.Sharding | None) -> jax.Array:
    """Casts and places a tensor, or of a sharded one each part by itself.

    Always by a copy: the tensor may be a view of a file that is closed or changed later.
    """

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        source = tensor if index is None else tensor[index]
        copy = _aligned(source.shape, dtype)
        np.copyto(copy, source, casting="unsafe")
        return copy

    if target is None:
        placed = jax.device_put(part(None))
    else:
        placed = jax.make_array_from_callback(tensor.shape, target, part)
    # The copy is alive until it has arrived, and the next tensor must not come before.
    return placed.block_until_ready()


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory that JAX takes over on CPU instead of copying it; its content is not defined."""
    num_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Raises one `CheckpointError` about all `problems` of `path`, if there are any."""
    if not problems:
        return
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    raise CheckpointError(f"{path}: {shown}" + (f"; and {more} more" if more > 0 else ""))


def _check_names_and_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    store: TensorStore,
    *,
    ignored: Collection[str | None],
) -> None:
    problems = []
    for path, source in sources.items():
        wanted = source.stored_shape(shapes[path])
        found = store.shapes.get(source.name)
        if found is None:
            problems.append(f"{source.name} is missing")
        elif found != wanted:
            problems.append(
                f"{source.name} has shape {list(found)}, the config asks for {list(wanted)}"
            )
    known = {source.name for source in sources.values()} | set(ignored)
    problems += [
        f"{name} is left over: the config has no place for it"
        for name in store.shapes
        # Llama-2 checkpoints store the rotary frequencies; they follow from the config.
        if name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    raise_problems(store.path, problems)


def _spare_head(
    config: ModelConfig, store: TensorStore, source_of: Callable[[str, ModelConfig], Source]
) -> str | None:
    """Name of an unembedding that is stored although the config ties it to the embedding."""
    name = source_of("head.w", config).name
    return name if config.tied_embeddings and name in store.shapes else None


def _check_tie(embedding: str, head: str, store: TensorStore) -> None:
    if not np.array_equal(store.read(embedding), store.read(head)):
        raise CheckpointError(
            f"{store.path}: tie_word_embeddings is true, yet {head} differs from {embedding}"
        )
