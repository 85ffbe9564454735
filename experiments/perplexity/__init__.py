"""Perplexity of long texts, by position, under eviction while decoding and after a prefill."""
