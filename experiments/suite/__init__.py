"""A fixed selection of all benchmarks, and one report of it."""
