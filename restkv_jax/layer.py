"""One layer's attention as a policy sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.window_scores import (
    Kind,
    ScoreForm,
    window_attention,
    window_scores,
    window_visible,
)
from restkv_jax.protocols import LayerSpec

Result = TypeVar("Result")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Tokens that follow a prompt only to look at it: their queries score, nothing of them stays.

    Attributes:
        q: [B, N, Q, H] queries.
        k: [B, K, Q, H] keys, as the queries see each other too, causally.
        v: [B, K, Q, H] values.
    """

    q: Float[Array, "B N Q H"]
    k: Float[Array, "B K Q H"]
    v: Float[Array, "B K Q H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a policy may look at: one layer, rows aligned to the right.

    The columns are a prompt, or what a cache holds of one: then every head has positions of its
    own, ascending from the left, behind the columns that are empty.

    Attributes:
        q: [B, N, Q, H] the last Q queries.
        k: [B, K, T, H] keys.
        v: [B, K, T, H] values.
        factor: [N, H, R] with factor · factorᵀ = W_O W_Oᵀ for each head.
        lengths: [B] tokens of each row so far, evicted ones counted.
        spec: static shape and arithmetic of the layer.
        w_o: [N, H, D] the output projection itself, for norms other than the Euclidean.
        index: which layer this is; not static, so that layers that are alike compile once.
        num_layers: static, layers of the model.
        cached_positions: [B, K, T] position of each entry of a cache, -1 for an empty slot. None
            for a prompt, whose last `lengths` columns are its tokens.
        carried: [B, N, T] what the policy handed on at the last eviction, negative for entries
            that came later. None if this is the first.
        log_sums: [B, N, Q] log of each query's sum of exp(logits) over a prompt, +inf for padding,
            if its attention was computed before; else None.
        received: [B, N, T] what each key of a prompt receives of all its queries' attention, if
            that was added up on the way; else None.
        probe: whose queries policies with a window score by instead of the last ones, or None.
    """

    q: Float[Array, "B N Q H"]
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    factor: Float[Array, "N H R"]
    lengths: Int[Array, " B"]
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    w_o: Float[Array, "N H D"] | None = None
    index: int | Int[Array, ""] = 0
    num_layers: int = dataclasses.field(default=1, metadata={"static": True})
    cached_positions: Int[Array, "B K T"] | None = None
    carried: Float[Array, "B N T"] | None = None
    log_sums: Float[Array, "B N Q"] | None = None
    received: Float[Array, "B N T"] | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        """Starts the memory of `once`, which is no part of the value."""
        object.__setattr__(self, "_memory", (None, {}))

    def once(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What `make` returns, made once however many policies and budgets ask for it.

        XLA merges equal operations, but not equal loops. What was made inside of a `jit`, `vmap`
        or loop means nothing outside, so another trace starts anew.
        """
        now = get_opaque_trace_state()
        trace, made = self._memory  # type: ignore[attr-defined]
        if trace != now:
            made = {}
            object.__setattr__(self, "_memory", (now, made))
        if key not in made:
            made[key] = make()
        return made[key]

    @property
    def columns(self) -> int:
        """T."""
        return self.k.shape[2]

    @property
    def valid(self) -> Bool[Array, "B M T"]:
        """True for columns that hold a token; M is K or 1, for all heads."""
        return self.positions >= 0

    @property
    def filled(self) -> Int[Array, "B M"]:
        """Columns that hold a token."""
        if self.cached_positions is None:
            return self.lengths[:, None]
        return jnp.sum(self.valid, axis=-1, dtype=jnp.int32)

    @property
    def positions(self) -> Int[Array, "B M T"]:
        """Each column's position in its row, negative for padding; M is K or 1."""
        if self.cached_positions is not None:
            return self.cached_positions
        first = self.columns - self.lengths[:, None, None]
        return jnp.arange(self.columns, dtype=jnp.int32) - first

    def query_positions(self, rows: int) -> Int[Array, "B R"]:
        """Positions of the last `rows` queries, negative before the row's start."""
        return self.lengths[:, None] - rows + jnp.arange(rows, dtype=jnp.int32)

    def by_query_head(self, x: Array) -> Array:
        """Repeats an array [B, M, ...] for the query heads of each group; M = 1 stays as it is."""
        return x if x.shape[1] == 1 else jnp.repeat(x, self.spec.group_size, axis=1)

    def mean_over_heads(self, x: Float[Array, "B M *E"]) -> Float[Array, "B 1 *E"]:
        """Mean over all heads of the layer; of heads on several devices by one all-reduce."""
        mean = jnp.mean(x, axis=1, keepdims=True)
        axis = self.spec.head_axis
        return mean if axis is None else jax.lax.pmean(mean, axis)

    @property
    def first_kv_head(self) -> int | Int[Array, ""]:
        """Index in the layer of the first of these key/value heads: 0 unless they are a share."""
        axis = self.spec.head_axis
        return 0 if axis is None else jax.lax.axis_index(axis) * self.k.shape[1]

    def distance_factor(self, *, project: bool) -> Float[Array, "N H R"]:
        """What differences of values are multiplied by before their norm: W_O's factor, or I."""
        if project:
            return self.factor
        size = self.spec.head_dim
        return jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), (self.spec.num_heads, size, size))

    @property
    def seen_values(self) -> Float[Array, "B K S H"]:
        """Values of what the window sees: the columns, behind them a probe's own tokens."""
        if self.probe is None:
            return self.v
        return jnp.concatenate([self.v, self.probe.v.astype(self.v.dtype)], axis=2)

    def window_weights(self, window: int) -> Float[Array, "B N W S"]:
        """Softmax attention of the last `window` queries, causal, padding left out.

        S is T, or T + Q with a probe, whose last queries are taken. Where there are fewer than
        `window`, those that are missing weigh nothing, as do those before a row's start.

        Raises:
            ValueError: the layer holds more columns than queries, and fewer than `window`.
        """
        return self.once(("window_weights", window), lambda: self._window_weights(window))

    def window_scores(
        self,
        window: int,
        row_weights: Float[Array, " W"] | None,
        *,
        kind: Kind,
        past: int,
        factor: Float[Array, "N H R"] | None = None,
        **options: Any,
    ) -> Float[Array, "B N P"]:
        """Scores of the first `past` columns by the last `window` queries, see `window_scores`.

        Args:
            window: W.
            row_weights: weight of each query; None takes the maximum over them.
            kind: of score.
            past: P.
            factor: of distances, for reconstruction errors.
            options: further fields of `ScoreForm`.
        """
        q, k, queries, positions = self._window_arrays(window)
        spec = self.spec
        form = ScoreForm(
            kind=kind,
            past=past,
            scale=spec.scale,
            softcap=spec.softcap,
            sliding_window=spec.window,
            **options,
        )
        return window_scores(
            q,
            k,
            None if kind == "attention" else self.seen_values,
            factor,
            row_weights,
            queries,
            positions,
            form=form,
            weights=self.window_weights(window),
            log_sums=self._window_log_sums(window),
        )

    def of_window_weights(
        self, window: int, reduce: Callable[[Float[Array, "B G W S"]], Float[Array, "B G"]]
    ) -> Float[Array, "B N"]:
        """`reduce` of the window's weights, by query head.

        On CPU other scores share the weights. Elsewhere kernels make those scores without them,
        and one key head's G query heads at a time are weighed for this alone.
        """

        def shared(weights: Array, *_: Array) -> Array:
            return reduce(weights)

        def in_turn(
            _: Array, log_sums: Array | None, q: Array, k: Array, queries: Array, positions: Array
        ) -> Array:
            batch, kv_heads = k.shape[:2]
            seen = window_visible(queries, positions, self.spec.window)
            seen = jnp.broadcast_to(seen, (batch, kv_heads, *seen.shape[2:]))
            q, log_sums = jax.tree.map(
                lambda x: x.reshape(batch, kv_heads, -1, *x.shape[2:]), (q, log_sums)
            )

            def group(args: tuple[Array, Array, Array, Array | None]) -> Array:
                q, k, seen, log_sums = args
                weights = window_attention(
                    q,
                    k[:, None],
                    seen[:, None],
                    scale=self.spec.scale,
                    softcap=self.spec.softcap,
                    log_sums=log_sums,
                )
                return reduce(weights)

            by_head = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, seen, log_sums))
            return jnp.moveaxis(jax.lax.map(group, by_head), 0, 1).reshape(batch, -1)

        log_sums = self._window_log_sums(window)
        arrays = self.window_weights(window), log_sums, *self._window_arrays(window)
        return jax.lax.platform_dependent(*arrays, cpu=shared, default=in_turn)

    def window_visible(self, window: int) -> Bool[Array, "B M W T"]:
        """True where one of the last `window` queries may look."""
        return window_visible(self.query_positions(window), self.positions, self.spec.window)

    def _window_log_sums(self, window: int) -> Float[Array, "B N W"] | None:
        """Those of the window's queries, if the prompt's attention made them over all it sees."""
        if self.log_sums is None or self.probe is not None or self.log_sums.shape[2] < window:
            return None
        return self.log_sums[:, :, -window:]

    def _window_weights(self, window: int) -> Float[Array, "B N W S"]:
        q, k, queries, positions = self._window_arrays(window)
        return window_attention(
            q,
            k,
            window_visible(queries, positions, self.spec.window),
            scale=self.spec.scale,
            softcap=self.spec.softcap,
        )

    def _window_arrays(self, window: int) -> tuple[Array, Array, Array, Array]:
        """Queries and keys of the window's attention, and the positions of both."""
        q, k, positions, queries = self.q, self.k, self.positions, self.query_positions(window)
        if self.probe is not None:
            q, own = self.probe.q, jnp.arange(self.probe.q.shape[2], dtype=jnp.int32)
            queries = queries + own.size
            k = jnp.concatenate([k, self.probe.k.astype(k.dtype)], axis=2)
            queries = jnp.where(jnp.arange(window) >= window - own.size, queries, -1)
            behind = jnp.broadcast_to(own, (*positions.shape[:2], own.size))
            positions = jnp.concatenate([positions, self.lengths[:, None, None] + behind], axis=2)
        elif q.shape[2] < min(window, self.columns):
            raise ValueError(f"q: expected at least the last {window} queries, got {q.shape[2]}")
        q = q[:, :, -window:]
        q = jnp.pad(q, ((0, 0), (0, 0), (window - q.shape[2], 0), (0, 0)))
        return q, k, queries, positions
