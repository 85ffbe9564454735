"""Factors of the output projections, computed once for weights that stay as they are."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.window_scores import output_factor
from restkv_jax.protocols import Attend, CausalLM, LayerSpec, Projection, State
from restkv_jax.sharding import ShardedLM


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredLM:
    """A `CausalLM` that hands `attend` the factor of each W_O beside W_O itself.

    A prefill of the bare model factorises every W_O anew. Make a new one whenever the weights
    change.

    Attributes:
        model: the model.
        factors: [N, H, R] for each layer, see `with_output_factors`.
    """

    model: CausalLM
    factors: tuple[Float[Array, "N H R"], ...]

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The model's."""
        return self.model.layer_specs

    @property
    def kv_dtype(self) -> DTypeLike:
        """The model's."""
        return self.model.kv_dtype

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Runs the model, the factor added in each call of `attend`; see `CausalLM`."""

        def with_factor(
            layer: int | Array, q: Array, k: Array, v: Array, w_o: Array | Projection, state: State
        ) -> tuple[Array, State]:
            pair = Projection(w_o=cast(Array, w_o), factor=self.factors[cast(int, layer)])
            return attend(layer, q, k, v, pair, state)

        return self.model(tokens, positions, with_factor, state)

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The model's."""
        return self.model.unembed(hidden)


def with_output_factors(model: CausalLM) -> FactoredLM:
    """Computes every layer's factor once, for any number of prefills.

    Args:
        model: a model whose loop over layers is unrolled.

    Raises:
        ValueError: the model scans over its layers, or it is sharded already: `shard` takes the
            model that this function returns.
    """
    if isinstance(model, ShardedLM):
        raise ValueError("model: expected one that is not sharded yet; shard what this returns")
    return FactoredLM(model=model, factors=_factors(model))


@jax.jit
def _factors(model: CausalLM) -> tuple[Float[Array, "N H R"], ...]:
    projections = output_projections(model)
    if not projections:
        raise ValueError("model: expected an unrolled loop over layers, got a scan")
    return tuple(output_factor(cast(Array, w_o)) for w_o in projections)


def output_projections(model: CausalLM) -> tuple[Float[Array, "N H D"] | Projection, ...]:
    """What the model hands to `attend` in each layer; nothing if it scans over its layers.

    It runs on one token, for nobody: under `jit`, XLA leaves out what is not used.

    Args:
        model: one that is not sharded.
    """

    def attend(
        layer: int | Array,
        q: Float[Array, "B T N H"],
        _k: Array,
        _v: Array,
        w_o: Float[Array, "N H D"] | Projection,
        found: tuple[Float[Array, "N H D"] | Projection, ...],
    ) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "N H D"] | Projection, ...]]:
        return jnp.zeros_like(q), (*found, w_o) if isinstance(layer, int) else found

    token = jnp.zeros((1, 1), jnp.int32)
    _, found = model(token, token, attend, ())
    return found
