"""Which of transformers' decoders does the cache stand in for, and how?

`make models` writes `eval/results/models/` for each release of transformers, and from those docs/models.md.
"""
