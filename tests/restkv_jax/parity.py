"""Reads parity cases: numbers of the reference implementation, and inputs drawn from seeds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("RESTKV_PARITY_DIR", Path(__file__).parent.parent / "parity"))


def cases() -> list[dict]:
    """All cases of the folder's index."""
    listed = json.loads((FOLDER / "index.json").read_text())
    return listed["cases"] if isinstance(listed, dict) else listed


def make_inputs(
    seed: int, heads: int, length: int, size: int, width: int, window: int, kind: str
) -> tuple[np.ndarray, ...]:
    """q, k, v [1, H, L, D] and W_O [C, H * D] in float32; the order of draws matters."""
    r = np.random.default_rng(seed)
    q, k, v = (r.standard_normal((1, heads, length, size)) for _ in range(3))
    w_o = r.standard_normal((width, heads * size)) / np.sqrt(heads * size)
    u = r.standard_normal((heads, size))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    sign = np.where(r.random(heads) < 0.5, -1.0, 1.0)
    v = v * (0.5 + r.random((1, heads, length, 1)))
    direction = u[None, :, None, :]
    if kind == "smooth":
        q = 0.5 * q
    elif kind == "peaky":
        q = 3.0 * q
    elif kind == "drift":
        ramp = np.linspace(-1.0, 1.0, length)[None, None, :, None]
        k = k + 4.0 * ramp * direction * np.sqrt(size) / 4.0
        row = np.ones(length)
        row[length - window : length - window // 2] = -1.0
        q = q + 5.0 * sign[None, :, None, None] * row[None, None, :, None] * direction
    elif kind == "tzero":
        q[:, :, length - window :, :] = 2.0 * direction * np.sqrt(size)
        k = 0.3 * k
        hot = r.choice(length - window - 20, size=min(300, length - window - 20), replace=False)
        k[:, :, hot, :] += direction * (1.0 + np.arange(hot.size)[None, None, :, None] / hot.size)
    else:
        raise KeyError(kind)
    return tuple(a.astype(np.float32) for a in (q, k, v, w_o))
