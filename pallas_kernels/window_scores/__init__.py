"""Attention of the last W queries, and what removing a key would do to it."""

from pallas_kernels.window_scores.reference import (
    aggregated_reconstruction,
    output_factor,
    per_query_reconstruction,
    window_attention,
    window_logits,
    window_outputs,
)

__all__ = [
    "aggregated_reconstruction",
    "output_factor",
    "per_query_reconstruction",
    "window_attention",
    "window_logits",
    "window_outputs",
]
