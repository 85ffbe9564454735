"""Which columns stay, and moving them into the cache's slots."""

from pallas_kernels.masked_eviction.reference import compact, select_slots

__all__ = ["compact", "select_slots"]
