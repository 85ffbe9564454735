"""A model with some of its layers."""

import dataclasses

from models.registry import make_network
from models.weights import named_parameters


def with_layers(model, layers):
    """The model with these of its layers alone, renumbered; its other weights stay."""
    config = model.config
    chosen = list(layers)
    values = named_parameters(model)

    def weights(path, _):
        if path.startswith("layers."):
            _, layer, name = path.split(".", 2)
            path = f"layers.{chosen[int(layer)]}.{name}"
        return values[path]

    windows = tuple(config.windows[layer] for layer in chosen)
    fewer = dataclasses.replace(config, num_layers=len(chosen), windows=windows)
    return make_network(fewer, weights)
