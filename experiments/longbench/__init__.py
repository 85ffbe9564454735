"""LongBench, and an offline suite in its format: `python -m experiments.longbench`."""
