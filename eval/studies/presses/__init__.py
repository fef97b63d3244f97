"""Which score tells the tokens that a press should keep, and in how many bits?

`eval/results/press-search.json`; what came out is `PiKVPress`, and docs/presses.md compares it.
"""
