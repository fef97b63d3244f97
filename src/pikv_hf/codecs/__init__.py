"""Codecs: how full pages of keys or values are encoded, and which codec a page goes to.

It may import the configuration, common helpers and kernels, but no pools. In come tokens of full pages; out go their
codes, the errors that these make, and the way of queries into the space of codes and of outputs out of it.
"""
