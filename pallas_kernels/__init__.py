"""Kernels of the eviction step: one folder an op, each with its XLA reference."""
