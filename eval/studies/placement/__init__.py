"""How evenly do placements of tokens fill many devices, and how many experts' tokens do they keep together?

`eval/results/placement.json`; docs/placement.md discusses it.
"""
