"""How far models with evicted caches are from themselves with the full cache."""
