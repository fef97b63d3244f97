"""Keeping a layer within its budget: the scheduler counts what attention reads, and has the least useful pages evicted.

It may import page tables, pools and everything below them, but neither layers nor attention. In come a budget, page
tables and the attention mass of each page; out go pages, freed, and the order in which a tier gives its pages away.
"""
