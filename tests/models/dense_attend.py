"""The plainest `attend`: all scores at once, float32, no cache. The oracle of the model tests."""

import jax
import jax.numpy as jnp

from restkv_jax.protocols import Attend, LayerSpec


def dense_attend(specs: tuple[LayerSpec, ...], positions: jax.Array) -> Attend:
    """Attention among the tokens of one call; the state passes through.

    Args:
        specs: of the model's layers.
        positions: [B, T]; -1 marks padding, which nobody sees.

    Returns:
        The function to hand to the model.
    """
    distance = positions[:, :, None] - positions[:, None, :]
    causal = (distance >= 0) & (positions >= 0)[:, None, :]

    def attend(layer, q, k, v, w_o, state):
        spec = specs[layer]
        batch, length = q.shape[:2]
        assert q.shape[2:] == (spec.num_heads, spec.head_dim)
        assert k.shape[2:] == v.shape[2:] == (spec.num_kv_heads, spec.head_dim)
        assert w_o.shape[:2] == (spec.num_heads, spec.head_dim)
        grouped = (batch, length, spec.num_kv_heads, spec.group_size, spec.head_dim)
        q, k, v = (x.astype(jnp.float32) for x in (q.reshape(grouped), k, v))
        scores = spec.scale * jnp.einsum("btkgh,bskh->bkgts", q, k)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        seen = causal if spec.window is None else causal & (distance < spec.window)
        # Finite, so that a padded query, which sees nothing, does not give NaN.
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        heads = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v)
        return heads.reshape(batch, length, spec.num_heads, spec.head_dim), state

    return attend


@jax.jit
def dense_logits(model, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Logits [B, T, V] of a whole batch."""
    attend = dense_attend(model.layer_specs, positions)
    hidden, _ = model(tokens, positions, attend, None)
    return model.unembed(hidden)
