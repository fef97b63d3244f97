"""How much of the attention do the pages cover that a routing policy reads, and what does reading only these cost?

`eval/results/routing.json`; docs/routing.md discusses it.
"""
