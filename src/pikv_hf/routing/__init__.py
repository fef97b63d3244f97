"""Routing of pages: which of a row's full pages each KV head reads in a decoding step.

It may import page tables and everything below them; it knows no attention and no layer. In come queries and the index
of a table's full pages; out goes a choice of columns of that index, or None where all pages are to be read.
"""
