"""What an entry is worth by definition: how a layer's output changes when it alone is taken away.

A yardstick for policies, not one of them: it costs a softmax for every entry and query. Nothing is
approximated; the only shortcut is that the sums over all keys but one are put together from those
over the keys before it and those over the keys behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.window_scores import output_factor, window_logits
from restkv_jax.cache import KVCache
from restkv_jax.layer import LayerInputs
from restkv_jax.policies.base import Granularity
from restkv_jax.prefill import align_right
from restkv_jax.prompt_attention import causal_attention
from restkv_jax.protocols import CausalLM, LayerSpec, Projection

# A softmax over some keys: its peak, the sum of exp(logit - peak), and the same times the values.
_Partial = tuple[Array, Array, Array]


@functools.partial(jax.jit, static_argnames=("window", "granularity"))
def leave_one_out(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    window: int,
    granularity: Granularity = "kv_head",
) -> tuple[Float[Array, "B J T"], ...]:
    """`removal_changes` of every layer of a prompt, computed with full attention.

    Args:
        model: see `CausalLM`.
        tokens: prompts, padded on either side.
        valid: True for tokens, one contiguous run of at least one in each row.
        window: W, the last queries that are looked at.
        granularity: whose entry is taken away, see `WindowPolicy`.

    Returns:
        For each layer the change by set of entries (J is K or N by granularity) and column; the
        last columns are the prompt's tokens, those before them 0.
    """
    tokens, lengths = align_right(tokens, valid)
    columns = tokens.shape[1]
    positions = jnp.maximum(jnp.arange(columns) - (columns - lengths[:, None]), -1)
    specs = model.layer_specs

    def attend(
        layer: int | Array,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        w_o: Float[Array, "N H D"] | Projection,
        found: tuple[Array, ...],
    ) -> tuple[Float[Array, "B T N H"], tuple[Array, ...]]:
        if not isinstance(layer, int):
            raise ValueError("model: expected an unrolled loop over layers, got a scan")
        spec = specs[layer]
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        if not isinstance(w_o, Projection):
            w_o = Projection(w_o=w_o, factor=output_factor(w_o))
        inputs = LayerInputs(
            q=q, k=k, v=v, factor=w_o.factor, w_o=w_o.w_o, lengths=lengths, spec=spec
        )
        sets = spec.num_kv_heads if granularity == "kv_head" else spec.num_heads
        out, _ = causal_attention(q, k, v, lengths, spec=spec, rows=0)
        found = (*found, removal_changes(inputs, window=min(window, columns), sets=sets))
        return jnp.swapaxes(out, 1, 2), found

    return model(tokens, positions, attend, ())[1]


def removal_changes(layer: LayerInputs, *, window: int, sets: int) -> Float[Array, "B J T"]:
    """Mean over the last W queries of ‖Σ_h (o_h - o_h_without_n) W_O_h‖, h in the set of n.

    What is left without n is normalised anew; if nothing is, it is 0. The difference is computed
    as a_n (v_n - o_without_n), which is the same and loses no digits when a_n is small. Queries
    that do not see n count with 0. One query at a time is looked at: [B, N, T, H] is the largest
    array.

    Args:
        layer: one layer's attention.
        window: W, at most the queries that there are.
        sets: J, sets of entries: the query heads of a set, N / J of them, lose n together.
    """
    heads = layer.spec.num_heads
    w_o = layer.w_o
    assert w_o is not None
    factor = output_factor(w_o.reshape(sets, -1, w_o.shape[-1]))
    v = jnp.repeat(layer.v.astype(jnp.float32), heads // layer.v.shape[1], axis=1)
    logits = window_logits(
        layer.q[:, :, -window:],
        layer.k,
        layer.window_visible(window),
        scale=layer.spec.scale,
        softcap=layer.spec.softcap,
    )

    def add(
        total: Float[Array, "B J T"], logit: Float[Array, "B N T"]
    ) -> tuple[Float[Array, "B J T"], None]:
        peak, below, above = _all_but_one(logit, v)
        without = above / jnp.where(below == 0.0, 1.0, below)
        # The weight of n among all: e_n / (e_n + the others), each against the larger peak.
        base = jnp.maximum(peak, logit[..., None])
        base = jnp.where(jnp.isfinite(base), base, 0.0)
        own, others = jnp.exp(logit[..., None] - base), jnp.exp(peak - base) * below
        change = own / jnp.where(own == 0.0, 1.0, own + others) * (v - without)
        by_set = change.reshape(change.shape[0], sets, -1, *change.shape[2:])
        flat = jnp.moveaxis(by_set, 2, 3).reshape(*by_set.shape[:2], change.shape[2], -1)
        projected = jnp.einsum("bjtx,jxr->bjtr", flat, factor, precision="highest")
        return total + jnp.linalg.norm(projected, axis=-1), None

    start = jnp.zeros((v.shape[0], sets, layer.columns), jnp.float32)
    total, _ = jax.lax.scan(add, start, jnp.moveaxis(logits, 2, 0))
    return total / window


def oracle_overlap(
    cache: KVCache,
    specs: tuple[LayerSpec, ...],
    changes: Sequence[np.ndarray],
    window: int,
) -> list[np.ndarray]:
    """Which share of the past that is kept the oracle would keep too, on the host.

    The past is what lies before the last W tokens. The oracle keeps as many of it as a set does:
    those with the largest changes, ties to the lower position.

    Args:
        cache: of the prompt, nothing decoded yet.
        specs: of the layers.
        changes: of `leave_one_out` with the same W and the cache's granularity, on the host.
        window: W.

    Returns:
        [B, J] for each layer; NaN where nothing of the past is kept, and in layers with a sliding
        window, which choose nothing.
    """
    lengths = np.asarray(cache.next_position)
    shares = []
    for layer, (spec, change) in enumerate(zip(specs, changes, strict=True)):
        positions, owners = np.asarray(cache.kept_positions(layer)), cache.owners(layer)
        marks = None if owners is None else np.asarray(owners)
        share = np.full(change.shape[:2], np.nan)
        for b, j in np.ndindex(*share.shape if spec.window is None else (0, 0)):
            kept = positions[b, j] if marks is None else positions[b][marks[b] == j]
            past = max(int(lengths[b]) - window, 0)
            kept = kept[(kept >= 0) & (kept < past)]
            if kept.size:
                first = change.shape[2] - int(lengths[b])
                worth = change[b, j, first : first + past]
                best = np.argsort(-worth, kind="stable")[: kept.size]
                share[b, j] = np.isin(kept, best).mean()
        shares.append(share)
    return shares


def _all_but_one(logit: Float[Array, "B N T"], v: Float[Array, "B N T H"]) -> _Partial:
    """For each key the softmax over all others: [B, N, T, 1], the same, [B, N, T, H]."""
    seen = jnp.isfinite(logit)[..., None]
    each = (logit[..., None], seen.astype(jnp.float32), jnp.where(seen, v, 0.0))
    before = jax.lax.associative_scan(_merge, each, axis=2)
    behind = jax.lax.associative_scan(_merge, each, axis=2, reverse=True)

    def shifted(parts: _Partial, by: int) -> _Partial:
        widths = [(0, 0), (0, 0), (max(by, 0), max(-by, 0)), (0, 0)]
        start = max(-by, 0)
        size = logit.shape[2]
        padded = (
            jnp.pad(x, widths, constant_values=empty)
            for x, empty in zip(parts, (-jnp.inf, 0.0, 0.0), strict=True)
        )
        peak, total, out = (jax.lax.slice_in_dim(x, start, start + size, axis=2) for x in padded)
        return peak, total, out

    return _merge(shifted(before, 1), shifted(behind, -1))


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """Two softmaxes over different keys as one."""
    peak = jnp.maximum(a[0], b[0])
    base = jnp.where(jnp.isfinite(peak), peak, 0.0)
    left, right = jnp.exp(a[0] - base), jnp.exp(b[0] - base)
    return peak, left * a[1] + right * b[1], left * a[2] + right * b[2]
