"""Models with evicted caches, as a model class of the lm-evaluation-harness."""
