"""The policies that say which pages go first: LRU, H2O, Quest and others, one in each file.

They see arrays of page statistics and return priorities; they know no page table and no pool, only how the usage
counters of pages decay. `registry` makes them by name for the scheduler, and for studies that replay traces.
"""
