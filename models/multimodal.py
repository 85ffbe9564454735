"""The language model inside a checkpoint that has an eye as well, which is left out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from models.config import ModelConfig
from models.names import Source, hf_source
from models.weights import TensorStore

_LOG = logging.getLogger(__name__)

# What a tensor's name starts with: the language model's (transformers from 4.52 on, and before),
# and what serves images alone.
_NEW, _OLD = "model.language_model.", "language_model."
_IMAGES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def text_source(store: TensorStore) -> Callable[[str, ModelConfig], Source]:
    """Where the parameters of the language model are: `hf_source` with the names of `store`."""
    new = any(name.startswith(_NEW) for name in store.shapes)

    def source(path: str, config: ModelConfig) -> Source:
        plain = hf_source(path, config)
        name = plain.name
        if not new:
            name = _OLD + name
        elif name.startswith("model."):  # the head stays where it is
            name = _NEW + name.removeprefix("model.")
        return dataclasses.replace(plain, name=name)

    return source


def image_tensors(store: TensorStore) -> set[str]:
    """Names of the tensors that only images need; logs how many are left out."""
    names = {name for name in store.shapes if name.startswith(_IMAGES)}
    if names:
        _LOG.warning(
            "%s: %d tensors of the vision tower and its projector are left out, by design: "
            "text goes in, and no images",
            store.path,
            len(names),
        )
    return names
