"""Rotary position embedding: its numbers, its frequencies, and the rotation itself."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency divided by one factor.

    Attributes:
        factor: how many times longer the context becomes, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "at least 1")

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies, [H/2]."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long waves are stretched, short ones kept, a smooth band between.

    Attributes:
        factor: divisor of the frequencies of long waves, at least 1.
        low_freq_factor: waves longer than `original_max_positions / low_freq_factor` are long.
        high_freq_factor: waves shorter than `original_max_positions / high_freq_factor` are kept.
        original_max_positions: the context length before stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "at least 1")
        _check(self.low_freq_factor > 0, "low_freq_factor", self.low_freq_factor, "positive")
        _check(
            self.high_freq_factor > self.low_freq_factor,
            "high_freq_factor",
            self.high_freq_factor,
            f"above low_freq_factor {self.low_freq_factor}",
        )
        _check(
            self.original_max_positions > 0,
            "original_max_position_embeddings",
            self.original_max_positions,
            "positive",
        )

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies, [H/2]."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """Every frequency divided by a factor of its own: what GGUF files store of a scaling.

    Attributes:
        factors: H/2 of them, in the order of the frequencies.
    """

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            _check(math.isfinite(factor) and factor > 0, "rope factor", factor, "positive")

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies, [H/2].

        Raises:
            ValueError: there are not as many factors as frequencies.
        """
        count = len(self.factors)
        _check(count == frequencies.size, "number of rope factors", count, str(frequencies.size))
        return frequencies / np.asarray(self.factors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of a layer.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: how the context was stretched beyond the one of pre-training, if it was.
    """

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | FrequencyFactors | None = None

    def __post_init__(self) -> None:
        _check(self.theta > 0, "rope_theta", self.theta, "positive")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each rotated pair.

        Args:
            head_dim: H.

        Returns:
            float32 [H/2], whatever the dtype of the weights: in bfloat16 far positions collide.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        frequencies = self.theta**-exponents
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies)
        return frequencies.astype(np.float32)


def rope_angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> Float[Array, "B T 1 H2"]:
    """Rotation angles, shared by the heads of all layers with the same `rope`.

    Args:
        rope: the embedding's numbers.
        head_dim: H.
        positions: absolute positions; -1 (padding) counts as 0, to stay finite and cheap.

    Returns:
        float32 angles, [B, T, 1, H/2].
    """
    at = jnp.maximum(positions, 0).astype(jnp.float32)
    return at[:, :, None, None] * jnp.asarray(rope.frequencies(head_dim))[None, None, None, :]


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T 1 H2"]) -> Float[Array, "B T N H"]:
    """Rotates pair (i, i + H/2) of every head by `angles[..., i]`; computes in float32."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x.dtype)


def _check(holds: bool, key: str, value: float, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key} is {value!r}: must be {wanted}")
