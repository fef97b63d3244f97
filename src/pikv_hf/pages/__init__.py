"""Pools of fixed-size pages: the free list, plain and packed contents, and what is kept beside them.

It may import codecs, the configuration, common helpers and kernels, but neither sequences nor tiers nor policies. In
come tokens and encoded pages; out go page numbers, and the tensors that attention reads at them.
"""
