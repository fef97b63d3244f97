"""Evaluation tasks: RULER, LongBench, perplexity, needle grids and the reference model's own suite.

A tokenizer, a length and a seed come in; samples (context, question, references) go out, and the scores of answers to
them. May import metrics and the bundled model; knows no cache and no press.
"""
