"""Which scheduling policy keeps the pages that attention wants next, and what do budgets cost in answers?

`eval/results/page-traces.json` (recorded traces against Belady's optimum) and `eval/results/budgets.json` (answers).
"""
