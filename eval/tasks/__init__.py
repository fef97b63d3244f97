"""Evaluation tasks: RULER, LongBench, perplexity, needle grids and the reference model's own suite."""
