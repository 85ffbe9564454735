"""Checkpoints as `models.convert` writes them: hub files around Orbax weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from models.decoder import Decoder
from models.errors import CheckpointError
from models.huggingface import read_config
from models.registry import make_network
from models.weights import (
    Sharding,
    all_finite,
    named_parameters,
    parameter_shapes,
    raise_problems,
    raise_unless_finite,
    shardings_of,
)

_WEIGHTS = "orbax"


def is_converted(folder: Path) -> bool:
    """Whether the folder holds Orbax weights."""
    return (folder / _WEIGHTS).is_dir()


def write_weights(folder: Path, model: Decoder) -> None:
    """Writes the weights into a folder, as they are."""
    with _checkpointer() as checkpointer:
        checkpointer.save((folder / _WEIGHTS).absolute(), named_parameters(model))


def read_model(folder: Path, dtype: DTypeLike, sharding: Sharding | None) -> Decoder:
    """Loads `config.json` and the Orbax weights of a folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the config, or a tensor is
            not finite.
        ValueError: a sharding does not fit its parameter.
    """
    config = read_config(folder)
    shapes = parameter_shapes(config)
    targets = shardings_of(shapes, sharding)
    here = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    wanted = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=targets[path] or here)
        for path, shape in shapes.items()
    }
    path = (folder / _WEIGHTS).absolute()
    with _checkpointer() as checkpointer:
        try:
            _check(path, shapes, checkpointer.metadata(path).item_metadata)
            values = checkpointer.restore(path, wanted)
        except CheckpointError:
            raise
        except Exception as err:  # whatever the storage layers raise
            cause = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: cannot be restored ({cause})") from err
    raise_unless_finite(path, {name: all_finite(value) for name, value in values.items()})
    return make_network(config, lambda name, _: values[name])


def _check(path: Path, shapes: dict[str, tuple[int, ...]], stored: Any) -> None:
    if stored is None:
        raise CheckpointError(f"{path}: not a whole Orbax checkpoint")
    found = {name: tuple(entry.shape) for name, entry in stored.tree.items()}
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [
        f"{name} has shape {list(shape)}, the config asks for {list(shapes[name])}"
        if name in shapes
        else f"{name} is left over: the config has no place for it"
        for name, shape in found.items()
        if shapes.get(name) != shape
    ]
    raise_problems(path, problems)


def _checkpointer() -> Any:
    # Imported here: it takes a while, and only this needs it.
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()
