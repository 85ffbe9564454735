"""Budgets: how many slots a head may keep, as a count or a share, by layer."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from restkv_jax.arguments import integer, whole_number

Budget = int | float


def checked_budget(budget: Budget, *, window: int) -> Budget:
    """A budget that a policy with this window can meet, an integer of numpy as Python's.

    Raises:
        ValueError: not a whole number of slots above `window`, nor a ratio within (0, 1].
    """
    if isinstance(budget, float):
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"budget: a ratio lies within (0, 1], got {budget!r}")
        return budget
    if integer(budget) is None:
        raise ValueError(f"budget: expected slots (int) or a ratio (float), got {budget!r}")
    return checked_slots("budget", budget, window=window)


def checked_slots(name: str, slots: int, *, window: int) -> int:
    """A number of slots that a policy with this window can meet, an integer of numpy as Python's.

    Raises:
        ValueError: beginning with `name`: not a whole number above `window`.
    """
    slots = whole_number(name, slots, least=1)
    if slots <= window:
        raise ValueError(
            f"{name}: {slots} slots do not hold the window of {window} tokens that is always "
            "kept; give more than that, or a smaller window"
        )
    return slots


def slot_capacity(budget: Budget, tokens: int, *, window: int) -> int:
    """Slots to allocate, static: the budget, or the ratio's share of `tokens` columns."""
    if isinstance(budget, int):
        return budget
    return max(math.ceil(budget * tokens), window + 1)


def row_budget(
    budget: Budget, lengths: Int[Array, " B"], *, window: int, capacity: int
) -> Int[Array, " B"]:
    """Slots that each row may fill, at most `capacity`; a ratio is of the row's own length."""
    if isinstance(budget, int):
        return jnp.full_like(lengths, min(budget, capacity))
    share = jnp.round(part(lengths, budget)).astype(lengths.dtype)
    return jnp.clip(share, min(window + 1, capacity), capacity)


def part(counts: Int[Array, "*B"], share: float) -> Float[Array, "*B"]:
    """What a share of them is, float32: under `jax_enable_x64` it rounds as it does without."""
    return counts.astype(jnp.float32) * share


def pyramid_past(past: int, columns: int, *, layer: int, num_layers: int) -> int:
    """Past tokens that PyramidKV gives to a layer: many at the bottom, few at the top.

    Args:
        past: tokens kept on average, the window not counted.
        columns: past tokens that there are.
        layer: index of the layer.
        num_layers: layers of the model.

    Returns:
        Past tokens to keep; linear in the layer, with the released code's integer arithmetic.
    """
    low = past // 20
    high = 2 * past - low
    if high >= columns:
        high, low = columns, 2 * past - columns
    return high - layer * ((high - low) // max(num_layers - 1, 1))


def pyramid_slots(slots: int, columns: int, *, window: int, layer: int, num_layers: int) -> int:
    """Slots of a layer under PyramidKV, the window counted (Cai et al., arXiv 2406.02069).

    As in the released code, a prompt that is shorter than twice the past budget is cut alike in
    all layers: the pyramid would ask for more than there is.

    Args:
        slots: slots on average.
        columns: tokens of the prompt.
        window: tokens that are kept in any case.
        layer: index of the layer.
        num_layers: layers of the model.
    """
    past = slots - window
    if columns < 2 * past:
        return slots
    return window + pyramid_past(past, columns - window, layer=layer, num_layers=num_layers)
