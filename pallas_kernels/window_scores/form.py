"""What `window_scores` computes: the static part of its arguments."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

Kind = Literal["attention", "aggregated", "per_query"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreForm:
    """Hashable, for `jit`.

    Attributes:
        kind: "attention" averages the rows' attention weights; "aggregated" and "per_query" are
            the reconstruction errors of `aggregated_reconstruction` and
            `per_query_reconstruction`.
        past: P, how many of the first keys are scored.
        scale: factor on q·k.
        softcap: c of c · tanh(logits / c), or None.
        sliding_window: how many positions a query looks back at, its own among them; all if None.
        tau: exponent of the distance, "aggregated" only.
        relative: divide by the norm of the row's output, "per_query" only.
        power: of each row's error before the average, "per_query" only.
    """

    kind: Kind
    past: int
    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    tau: float = 1.0
    relative: bool = False
    power: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what no implementation defines.

        Raises:
            ValueError: naming the option.
        """
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, got {self.kind!r}")
        if self.past < 0:
            raise ValueError(f"past: expected at least 0, got {self.past}")
        if self.kind != "aggregated" and self.tau != 1.0:
            raise ValueError(f'tau: expected 1 unless kind is "aggregated", got {self.tau}')
        if self.kind != "per_query" and (self.relative, self.power) != (False, 1.0):
            raise ValueError(
                'relative, power: expected False and 1 unless kind is "per_query", got '
                f"{self.relative} and {self.power}"
            )
