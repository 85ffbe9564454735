"""Checkpoints as `models.convert` writes them: hub files around Orbax weights."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from models.decoder import Decoder
from models.errors import CheckpointError
from models.huggingface import read_config
from models.names import Source
from models.registry import make_network
from models.weights import (
    Parameters,
    Sharding,
    all_finite,
    match,
    raise_problems,
    raise_unless_finite,
    shardings_of,
)

_WEIGHTS = "orbax"
# Of what a tensor is split into on disk. Larger than what the C library keeps for itself when it
# is given back, so that the memory of written chunks is really free.
_CHUNK_BYTES = 64 * 2**20


class OrbaxStore:
    """A `models.weights.TensorStore` over Orbax weights, under the network's own names.

    Args:
        folder: holds `config.json` and the weights.

    Raises:
        CheckpointError: the weights are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = (folder / _WEIGHTS).absolute()
        with _restoring(self.path), _standard_checkpointer() as checkpointer:
            stored = checkpointer.metadata(self.path).item_metadata
        if stored is None:
            raise CheckpointError(f"{self.path}: not a whole Orbax checkpoint")
        self.shapes = {name: tuple(entry.shape) for name, entry in stored.tree.items()}

    def read(self, name: str) -> np.ndarray:
        """The parameter, in the dtype it is stored in."""
        import orbax.checkpoint as ocp

        wanted = ocp.args.PyTreeRestore(
            item={name: 0},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        handler = ocp.PyTreeCheckpointHandler()
        with _restoring(self.path), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(self.path, args=wanted)[name]


def is_converted(folder: Path) -> bool:
    """Whether the folder holds Orbax weights."""
    return (folder / _WEIGHTS).is_dir()


def open_weights(folder: Path) -> Parameters:
    """Finds the parameters of the network that `config.json` describes.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the config.
    """
    return match(read_config(folder), OrbaxStore(folder), lambda path, _: Source(name=path))


def restore(parameters: Parameters, dtype: DTypeLike, sharding: Sharding | None) -> Decoder:
    """Builds a network from Orbax weights, which are read side by side.

    Args:
        parameters: of an `OrbaxStore`.
        dtype: of the weights in memory.
        sharding: where each parameter goes.

    Raises:
        CheckpointError: the checkpoint is damaged, or a tensor is not finite.
        ValueError: a sharding does not fit its parameter.
    """
    targets = shardings_of(parameters.shapes, sharding)
    here = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    wanted = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=targets[path] or here)
        for path, shape in parameters.shapes.items()
    }
    path = parameters.store.path
    with _restoring(path), _standard_checkpointer() as checkpointer:
        values = checkpointer.restore(path, wanted)
    raise_unless_finite(path, {name: all_finite(value) for name, value in values.items()})
    return make_network(parameters.config, lambda name, _: values[name])


def write_weights(folder: Path, parameters: Parameters, dtype: DTypeLike | None) -> None:
    """Writes weights into a folder, one after the other: one is in memory at a time.

    Args:
        folder: to write into.
        parameters: of a checkpoint of any format.
        dtype: of the stored weights; None for the one that each of them has.

    Raises:
        CheckpointError: tensors are not finite; all such are in the message.
    """
    import orbax.checkpoint as ocp

    target = (folder / _WEIGHTS).absolute()
    bad: list[str] = []
    leaves = {path: _Leaf(path) for path in parameters.shapes}
    chunks = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in leaves}
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_registry(parameters, dtype, bad))
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(target, args=ocp.args.PyTreeSave(leaves, save_args=chunks))
    raise_problems(parameters.store.path, [f"{name} holds NaN or infinity" for name in bad])


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Stands for a parameter that is read when its turn comes."""

    path: str


class _Uncopied(np.ndarray):
    """Orbax copies host arrays lest they change while it writes; these do not."""

    def __deepcopy__(self, _: dict[int, Any] | None) -> Self:
        return self


def _registry(parameters: Parameters, dtype: DTypeLike | None, bad: list[str]) -> Any:
    """How Orbax writes a `_Leaf`; what is not finite is added to `bad`."""
    from orbax.checkpoint import type_handlers

    class OneByOne(type_handlers.NumpyHandler):
        async def serialize(
            self, values: Sequence[_Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
        ) -> Sequence[Any]:
            for leaf, info, arg in zip(values, infos, args or [None] * len(infos), strict=True):
                value = parameters.read(leaf.path)
                if not np.isfinite(value).all():
                    bad.append(parameters.sources[leaf.path].name)
                value = value.astype(value.dtype if dtype is None else dtype, copy=False)
                written = await super().serialize(
                    [value.view(_Uncopied)], [info], None if arg is None else [arg]
                )
                del value
                for future in written:
                    await asyncio.to_thread(future.result)
            return []

    # The entry of JAX arrays is not used; Orbax warns where it is missing.
    return type_handlers.create_type_handler_registry(
        (_Leaf, OneByOne()), (jax.Array, type_handlers.ArrayHandler())
    )


@contextlib.contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """Whatever the storage layers raise becomes an error of one line about `path`."""
    try:
        yield
    except Exception as err:
        cause = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be restored ({cause})") from err


def _standard_checkpointer() -> Any:
    # Imported here: it takes a while, and only this needs it.
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()
