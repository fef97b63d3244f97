"""What a cache costs and has done: bytes of live storages, and counts of what was read, evicted and moved.

It may import layers and everything below them. In comes a cache's layers; out go reports that print as tables and turn
into plain values.
"""
