"""The evaluation programs: `python -m experiments.NAME`."""
