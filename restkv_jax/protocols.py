"""What `restkv_jax` asks of a model: call `attend` once a layer, and unembed.

Letters used in shapes everywhere: B batch, T tokens of the prompt, S cache slots, W window,
N query heads, K key/value heads, G = N / K, H head size, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, DTypeLike, Float, Int

State = TypeVar("State")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Static shape and arithmetic of one attention layer.

    Attributes:
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; query head n reads key/value head n // (N / K).
        head_dim: H.
        scale: factor on q·k before the softmax.
        softcap: c of `c * tanh(logits / c)`, or None.
        window: sliding window, the query itself counted; None sees everything before it.
        rotary: angle per position of each rotated pair (i, i + H/2) of queries and keys. Only
            plans that count positions by slot need it.
        head_axis: mesh axis that the heads are split over, None if every device has them all.
        head_shards: in how many parts they are split.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rotary: tuple[float, ...] | None = None
    head_axis: str | None = None
    head_shards: int = 1

    @property
    def group_size(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def share(self, num_heads: int) -> LayerSpec:
        """The layer as a device sees it that holds `num_heads` of its query heads."""
        kv_heads = num_heads // self.group_size
        return dataclasses.replace(self, num_heads=num_heads, num_kv_heads=kv_heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """An output projection together with its factor, computed before (see `FactoredLM`).

    Attributes:
        w_o: [N, H, D] W_O by head.
        factor: [N, H, R] with factor · factorᵀ = W_O W_Oᵀ for each head.
    """

    w_o: Float[Array, "N H D"]
    factor: Float[Array, "N H R"]


class Attend(Protocol[State]):
    """The attention of one layer, handed to the model by `prefill` and `decode_step`."""

    def __call__(
        self,
        layer: int | Array,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        w_o: Float[Array, "N H D"] | Projection,
        state: State,
        /,
    ) -> tuple[Float[Array, "B T N H"], State]:
        """Attends, and stores what the cache keeps of this layer.

        Args:
            layer: index into `model.layer_specs`; a model that scans over its layers may pass a
                traced index if all of them are alike.
            q: queries, after bias, normalisation and rotary embedding, not scaled.
            k: keys, likewise.
            v: values.
            w_o: this layer's output projection by head.
            state: what the last call of `attend` (or the model's caller) handed over.

        Returns:
            The heads' outputs before the output projection, and the state for the next layer.
        """
        ...


class CausalLM(Protocol):
    """A decoder-only model as an immutable pytree of weights.

    Anything that JAX flattens will do: an `nnx.Module`, a registered dataclass around a
    parameter dictionary, an equinox module.
    """

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One entry per layer, static."""
        ...

    @property
    def kv_dtype(self) -> DTypeLike:
        """Of the keys and values that the model hands to `attend`."""
        ...

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Runs all layers, calling `attend` once in each, in order.

        Args:
            tokens: token ids.
            positions: each token's position in its own row; -1 marks padding.
            attend: the attention to use.
            state: opaque; passed to the first `attend`, each result to the next.

        Returns:
            Hidden states after the final norm, and the last state.
        """
        ...

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32."""
        ...


@runtime_checkable
class StagedLM(CausalLM, Protocol):
    """A `CausalLM` that shows its residual stream, for measurements."""

    def stages(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend[State],
        state: State,
    ) -> Iterator[tuple[Float[Array, "B T D"], State]]:
        """The residual stream after each layer, then what `__call__` returns; arguments as there.

        Yields:
            Hidden states, and the state so far: one pair for each layer, and a last one after
            the final norm.
        """
        ...
