"""Compressed caches on disk: saved whole, restored only against the model that they belong to.

A saved cache is one Orbax checkpoint with two parts, which appear together or not at all:
`arrays/`, and `cache/metadata`, a JSON text that holds everything else: the plan with all options
of its policy, the model's identifier, layers, configuration and weights' fingerprint, and for each
array its shape, type and checksum.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from restkv_jax import description as described
from restkv_jax.cache import KVCache
from restkv_jax.decode_loop import DecodeState
from restkv_jax.fingerprint import checksum
from restkv_jax.plan import CachePlan
from restkv_jax.protocols import CausalLM
from restkv_jax.provenance import check_made_by, check_model, describe_model
from restkv_jax.sharding import ShardedLM

VERSION = 1
_FORMAT = "restkv-jax cache"
_ARRAYS, _DESCRIPTION = "arrays", "cache"

Sharding = Callable[[Any], Any]
"""From a state whose arrays are `ShapeDtypeStruct`s to a tree of the same structure that holds
their shardings."""


class CacheFolderError(ValueError):
    """A saved cache is damaged, or belongs to something else."""


class RestoredCache(NamedTuple):
    """What `restore_cache` returns.

    Attributes:
        state: as it was saved.
        plan: the plan that the cache was made by.
        model_id: the model's identifier.
    """

    state: KVCache | DecodeState
    plan: CachePlan
    model_id: str


def save_cache(
    folder: str | os.PathLike[str],
    state: KVCache | DecodeState,
    *,
    plan: CachePlan,
    model: CausalLM,
    model_id: str,
    overwrite: bool = False,
) -> None:
    """Writes a cache, or a generation in its middle, into a folder of its own.

    The folder appears when it is complete. What is overwritten stays until then.

    Args:
        folder: where to; must not exist unless `overwrite` is given.
        state: a cache, to be extended or decoded from; or a `DecodeState`, which goes on as if
            it had never stopped, random draws included.
        plan: that the cache was made by. One that gives caches of another form is refused; a cache
            does not tell the policy, unless it evicts while decoding, nor slots from headroom.
        model: that the cache was made with. Its layers, its weights and, if it has one that is a
            dataclass, its `config` are noted.
        model_id: its name; whoever restores must give the same.
        overwrite: replace a cache that is already there, and nothing but a cache.

    Raises:
        CacheFolderError: the folder exists, or holds something else than a saved cache.
        ValueError: the plan or the model cannot have made this cache, or the policy is not one
            of `POLICIES`.
    """
    folder = Path(folder).absolute()
    cache = state.cache if isinstance(state, DecodeState) else state
    if not isinstance(cache, KVCache):
        raise ValueError(f"state: expected a KVCache or a DecodeState, got {type(state).__name__}")
    check_made_by(cache, plan, model)
    exists = folder.exists()
    if exists and not overwrite:
        raise CacheFolderError(f"{folder}: exists already; overwrite=True replaces a saved cache")
    if exists:
        _read_description(folder)  # refuses to remove anything else
    arrays: dict[str, jax.Array] = {}
    description = {
        "format": _FORMAT,
        "version": VERSION,
        "model": describe_model(model, model_id),
        "plan": described.encode(plan, "plan", arrays),
        "state": described.encode(state, "state", arrays),
    }
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    target = new if exists else folder
    with _checkpointer() as (ocp, checkpointer):
        parts = {
            _ARRAYS: ocp.args.StandardSave(arrays),
            _DESCRIPTION: ocp.args.JsonSave(description),
        }
        checkpointer.save(target, args=ocp.args.Composite(**parts), force=exists)
    if exists:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old)


def restore_cache(
    folder: str | os.PathLike[str],
    *,
    model: CausalLM,
    model_id: str,
    sharding: Sharding | None = None,
) -> RestoredCache:
    """Reads what `save_cache` wrote; continuing from it gives the same bits.

    A cache that was saved on one device or mesh can be restored onto any other: the numbers are
    the same, and what follows is what that mesh would have given.

    Args:
        folder: a saved cache.
        model: must have the layers, the weights and the `config` that the cache was made with, on
            a mesh or not, with its factors or without. Of models without a `config`, what they
            compute with equal weights is not known.
        model_id: must be the name that it was saved under.
        sharding: where its arrays go, such as `rules.shardings` for `shard(model, rules)`; all on
            the default device if None. For random keys it is that of the numbers behind them,
            which have one axis more.

    Raises:
        CacheFolderError: there is no saved cache, it is damaged or of a newer format, or it was
            made with another model; the message says which, what was expected and what came.
        ValueError: its rows, heads or shared lists cannot be split as the model's mesh or
            `sharding` asks for.
    """
    folder = Path(folder).absolute()
    description = _read_description(folder)
    try:
        return _restore(folder, description, model, model_id, sharding)
    except described.DescriptionError as err:
        raise CacheFolderError(f"{folder}: {err}") from err


def _restore(
    folder: Path,
    description: Mapping[str, Any],
    model: CausalLM,
    model_id: str,
    sharding: Sharding | None,
) -> RestoredCache:
    check_model(_part(description, "model"), model, model_id)
    plan = described.decode(_part(description, "plan"))
    node = _part(description, "state")
    if isinstance(model, ShardedLM):
        model.rules.specs(described.decode(node, described.abstract))  # refuses what cannot be
    entries: dict[str, described.Entry] = {}

    def name_of(entry: described.Entry) -> str:
        entries[entry["array"]] = entry
        return str(entry["array"])

    names = jax.tree.leaves(described.decode(node, name_of))
    wanted = {name: described.numbers(entries[name]) for name in names}
    if sharding is None:
        # As NumPy arrays, and so not committed to a device: they compile nothing anew.
        likes = {
            name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in wanted.items()
        }
        arrays = jax.tree.map(jnp.asarray, _read_arrays(folder, likes))
    else:
        places = jax.tree.leaves(sharding(described.decode(node, described.abstract)))
        if len(places) != len(names):
            raise ValueError(f"sharding: {len(places)} shardings for {len(names)} arrays")
        for name, place in zip(names, places, strict=True):
            _require_split(name, wanted[name].shape, place)
            wanted[name] = wanted[name].update(sharding=place)
        arrays = _read_arrays(folder, wanted)
    sums = jax.device_get({name: checksum(value) for name, value in arrays.items()})
    for name, value in sums.items():
        described.expect(f"shape of {name}", wanted[name].shape, arrays[name].shape)
        described.expect(f"checksum of {name}", entries[name]["checksum"], int(value))

    def array(entry: described.Entry) -> jax.Array:
        return described.with_key(arrays[entry["array"]], entry)

    return RestoredCache(described.decode(node, array), plan, model_id)


def _require_split(name: str, shape: tuple[int, ...], place: jax.sharding.Sharding) -> None:
    try:
        place.shard_shape(shape)
    except ValueError as err:
        raise ValueError(f"sharding: {name} of shape {shape}: {err}") from err


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CacheFolderError(f"{folder}: no such folder")
    with _checkpointer() as (ocp, checkpointer):
        parts = ocp.args.Composite(**{_DESCRIPTION: ocp.args.JsonRestore()})
        try:
            description = checkpointer.restore(folder, args=parts)[_DESCRIPTION]
        except Exception as err:  # whatever the storage layers raise
            raise CacheFolderError(f"{folder}: not a whole saved cache ({_cause(err)})") from err
    found = description.get("format") if isinstance(description, dict) else None
    if found != _FORMAT:
        raise CacheFolderError(f"{folder}: format: expected {_FORMAT!r}, got {found!r}")
    version = description.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CacheFolderError(
            f"{folder}: version of the format: expected at most {VERSION}, got {version}; it "
            "needs a newer restkv-jax"
        )
    return dict(description)


def _read_arrays(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    with _checkpointer() as (ocp, checkpointer):
        parts = ocp.args.Composite(**{_ARRAYS: ocp.args.StandardRestore(wanted)})
        try:
            arrays = checkpointer.restore(folder, args=parts)[_ARRAYS]
        except Exception as err:  # whatever the storage layers raise
            raise CacheFolderError(f"{folder}: cannot restore its arrays ({_cause(err)})") from err
    return dict(arrays)


def _part(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = description.get(name)
    if not isinstance(part, dict):
        raise described.DescriptionError(f"its description has no {name!r}")
    return part


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    # Imported here: it takes a while, and only this needs it.
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        yield ocp, checkpointer


def _cause(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]
