"""Stand-ins for a model that show, or repeat, what passes between it and `attend`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, DTypeLike

from restkv_jax.protocols import Attend, CausalLM, LayerSpec, Projection, StagedLM, State

Call = tuple[Array, Array, Array]
"""Queries, keys and values that a model gave to `attend`, [B, T, N or K, H]."""


class Recorder:
    """A model that remembers, while it is traced, what passes through it."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.layer_specs, self.kv_dtype = model.layer_specs, model.kv_dtype
        self.unembed = model.unembed
        self.calls: list[Call] = []
        self.projections: list[Array] = []
        self.outputs: list[Array] = []
        self.stages: list[Array] = []

    def __call__(
        self, tokens: Array, positions: Array, attend: Attend[State], state: State
    ) -> tuple[Array, State]:
        """As of the model."""

        def recorded(
            layer: int | Array, q: Array, k: Array, v: Array, w_o: Array | Projection, state: State
        ) -> tuple[Array, State]:
            if not isinstance(layer, int):
                raise ValueError("model: expected an unrolled loop over layers, got a scan")
            out, state = attend(layer, q, k, v, w_o, state)
            self.calls.append((q, k, v))
            self.projections.append(w_o.w_o if isinstance(w_o, Projection) else w_o)
            self.outputs.append(out)
            return out, state

        if isinstance(self._model, StagedLM):
            for hidden, last in self._model.stages(tokens, positions, recorded, state):
                self.stages.append(hidden)
                state = last
        else:
            hidden, state = self._model(tokens, positions, recorded, state)
            self.stages.append(hidden)
        return self.stages[-1], state


class Replay:
    """A model whose layers ask `attend` what another run asked it."""

    def __init__(
        self,
        specs: tuple[LayerSpec, ...],
        calls: Sequence[Call],
        projections: Sequence[Array],
    ) -> None:
        self.layer_specs = specs
        self.kv_dtype: DTypeLike = calls[0][1].dtype
        self._calls, self._projections = calls, projections
        self.outputs: list[Array] = []

    def __call__(
        self, tokens: Array, positions: Array, attend: Attend[State], state: State
    ) -> tuple[Array, State]:
        """Calls `attend` once a layer; the last output stands for the hidden states."""
        del tokens, positions
        for layer, (call, w_o) in enumerate(zip(self._calls, self._projections, strict=True)):
            out, state = attend(layer, *call, w_o, state)
            self.outputs.append(out)
        return self.outputs[-1], state

    def unembed(self, hidden: Array) -> Array:
        """Nothing to say."""
        return hidden
