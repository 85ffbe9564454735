"""HumanEval behind a long context: functions that a model completes, and tests that they pass."""
