"""RULER's 13 tasks, generated for any tokenizer and length: `python -m experiments.ruler`."""
