"""Benchmarks of the cache against transformers' `DynamicCache`, both timed in the same run: what `pikv bench` calls.

Layers and models of known geometry with random weights come in; a row per case goes out, to the terminal and as JSON.
May import the runner and everything below it; knows neither the demo nor the reports.
"""
