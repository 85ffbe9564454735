"""Which columns stay, and moving them into the cache's slots."""

from pallas_kernels.masked_eviction.reference import compact, select_flat, select_slots
from pallas_kernels.masked_eviction.threshold import top_mask

__all__ = ["compact", "select_flat", "select_slots", "top_mask"]
