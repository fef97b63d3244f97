"""How well does `pikv plan` predict bytes of real caches and times of real steps?

`eval/results/plan-validation.json`; docs/planning.md discusses it.
"""
