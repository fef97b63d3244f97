"""Pages that are not all in fast memory: frames, rows of the host's memory, files, and the limits on each.

It may import pools, codecs and what is below them, but neither sequences nor policies. In come encoded pages and the
numbers of those that attention wants; out go their frames in fast memory, or copies of them.
"""
