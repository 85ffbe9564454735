"""A checkpoint of any format, opened: checked as a whole, with no weights read yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import DTypeLike

from models import gguf_model, gguf_tokenizer, huggingface, orbax_folder
from models.decoder import Decoder
from models.gguf_file import GGUFStore
from models.tokenizer import Tokenizer
from models.weights import Parameters, Sharding, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        parameters: where each parameter of the network is.
        tokenizer: raises CheckpointError when used if the checkpoint came without one.
        eos_ids: tokens that end a text, as the checkpoint says.
    """

    parameters: Parameters
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]

    def build(self, dtype: DTypeLike, sharding: Sharding | None) -> Decoder:
        """Builds the network; see `models.weights.build`."""
        # Matrices that become int8 are read one at a time, as wholes.
        if (
            isinstance(self.parameters.store, orbax_folder.OrbaxStore)
            and jnp.dtype(dtype) != jnp.int8
        ):
            return orbax_folder.restore(self.parameters, dtype, sharding)
        return build(self.parameters, dtype, sharding)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder in the hub's layout or as `models.convert` writes it, or a `.gguf` file.

    Raises:
        CheckpointError: it is damaged, incomplete or unsupported.
    """
    if path.is_dir():
        reader = orbax_folder if orbax_folder.is_converted(path) else huggingface
        tokenizer = huggingface.read_tokenizer(path)
        eos_ids = huggingface.read_eos_ids(path)
        parameters = reader.open_weights(path)
    else:
        store = GGUFStore(path)
        tokenizer = gguf_tokenizer.read_tokenizer(store)
        eos_ids = ()
        parameters = gguf_model.open_weights(store)
    return Checkpoint(
        parameters=parameters, tokenizer=tokenizer, eos_ids=eos_ids or tokenizer.eos_ids
    )
