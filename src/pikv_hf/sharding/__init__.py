"""Which shard a token lives in, and which device or process has which shard.

It may import `common` alone. In come positions, primary experts and loads; out go shard numbers, and the division of
shards among the parts of a layer, which follows the load while a cache is in use.
"""
