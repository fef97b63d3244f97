"""Metrics of the evaluation suites, as `evaluate.Metric` subclasses that need no network."""
