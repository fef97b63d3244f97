"""Runs of an evaluation: options, caches and presses by name, measurement, result folders.

Options come in, from the command line, Python or a YAML file; scores, bytes and times of each sample go out, into a
folder that is complete or can be resumed. May import tasks, metrics, the bundled model and the cache; knows no report.
"""
