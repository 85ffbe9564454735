"""Time and memory of prefill, scoring, eviction and decoding, against the device's floor."""
