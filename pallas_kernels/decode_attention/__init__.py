"""Attention of one new token over masked cache slots."""

from pallas_kernels.decode_attention.reference import decode_attention

__all__ = ["decode_attention"]
