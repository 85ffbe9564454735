"""Keys moved to other positions: the rotary embedding turned on by the difference."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rerotate(
    k: Float[Array, "*E H"], shift: Int[Array, "*E"], rotary: tuple[float, ...]
) -> Float[Array, "*E H"]:
    """Rotates pair (i, i + H/2) of every key by `shift * rotary[i]`; computes in float32.

    Args:
        k: keys after rotary embedding.
        shift: how many positions each key moves on; negative moves it back.
        rotary: angle per position of each pair, see `LayerSpec.rotary`.
    """
    angles = shift[..., None].astype(jnp.float32) * jnp.asarray(rotary, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(k.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(k.dtype)
