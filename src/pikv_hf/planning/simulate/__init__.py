"""Replaying a routing trace on more devices than one has: memory, traffic and time of a sharded cache.

It may import the rest of planning, placements and shard maps. In come a model's shape, a trace, recorded or made up,
and names of placements; out go figures per number of devices, which `pikv plan --simulate` prints and draws.
"""
