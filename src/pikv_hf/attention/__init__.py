"""Attention over the pages of a table: in place where pages lie side by side, else gathered or looked up by number.

It may import routing and all below it, pages of slower tiers included, but neither layers nor schedulers. In come a
page table, queries and a mask; out go partial outputs with their log-sum-exps, and the attention mass of each page.
"""
