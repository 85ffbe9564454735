"""What all runners share: options, prompts, the evaluation loop, results, tables."""
