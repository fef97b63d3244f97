"""Where a reader finds pages of a pool of which only some are in fast memory."""

import numpy as np
import torch
from families import FAMILIES
from tiered_runs import pools_of

from pikv_hf import PiKVCache
from pikv_hf.attention.tiered_reader import TieredReader


@torch.no_grad()
def test_pages_are_located_in_tensors_that_fetching_made_longer() -> None:
    model = FAMILIES["llama"].build()
    options = {"page_size": 4, "recent_window": 0, "placement": "hash", "tiers": {"cpu": "1MiB", "disk": None}}
    cache = PiKVCache.for_model(model, key_codec="int4", value_codec="int4", **options)
    model(torch.randint(2, 190, (1, 160), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    cache.memory_report()  # What waits for a router is stored now.
    pool = pools_of(cache)[0]
    ids = np.flatnonzero(pool.allocator.refcount)
    expected, _ = pool.codes_at(pool.index(ids))
    pool.shrink(1)
    there = TieredReader(pool).located(pool.index(ids))
    assert int(there.numbers.max()) < there.keys.pages
    assert torch.equal(there.keys.codes.index_select(1, there.numbers), expected.codes)
