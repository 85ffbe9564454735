"""Checks a checkpoint as a whole against a network, then builds the network from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError
from models.names import Source
from models.registry import make_network

_SHOWN_PROBLEMS = 8


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


def build(
    config: ModelConfig,
    store: TensorStore,
    source_of: Callable[[str, ModelConfig], Source],
    dtype: DTypeLike,
) -> Decoder:
    """Builds the network with the weights of a checkpoint.

    Args:
        config: the network.
        store: the checkpoint.
        source_of: from a parameter's path to its tensor, see `models.names`.
        dtype: of the weights in memory.

    Returns:
        The model.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or not finite; every
            such problem is in the message.
    """
    shapes = parameter_shapes(config)
    sources = {path: source_of(path, config) for path in shapes}
    spare_head = _spare_head(config, store, source_of)
    _check_names_and_shapes(shapes, sources, store, ignore=spare_head)
    if spare_head is not None:
        _check_tie(sources["embed.w"].name, spare_head, store)

    finite: dict[str, jax.Array] = {}

    def weights(path: str, _: tuple[int, ...]) -> jax.Array:
        source = sources[path]
        stored = source.convert(store.read(source.name))
        # A copy: the stored tensor may be a view of a file that is closed or changed later.
        value = jnp.asarray(np.array(stored, jnp.dtype(dtype), order="C"))
        finite[source.name] = jnp.isfinite(value).all()
        return value

    model = make_network(config, weights)
    # Asked once at the end: each answer is a wait for the device.
    bad = [f"{name} holds NaN or infinity" for name, ok in finite.items() if not bool(ok)]
    raise_problems(store.path, bad)
    return model


def weights_bytes(model: nnx.Module) -> int:
    """Memory that the model's weights take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


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
    ignore: str | None,
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
    known = {source.name for source in sources.values()} | {ignore}
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
