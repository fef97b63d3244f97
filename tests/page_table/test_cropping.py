"""Crops of tables whose pages were evicted."""

import torch
from families import FAMILIES

from pikv_hf import PiKVCache


@torch.no_grad()
def test_a_crop_passes_over_pools_that_were_emptied_and_deleted() -> None:
    model = FAMILIES["llama"].build()
    options = {"page_size": 4, "recent_window": 0, "sink_tokens": 0, "placement": "hash"}
    cache = PiKVCache.for_model(model, key_codec="int4", value_codec="int4", **options)
    ids = torch.randint(2, 190, (1, 80), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache)
    cache.memory_report()  # What waits for a router is stored now.
    for layer in cache.layers:
        [table] = layer.store.tables()
        [sequence] = table.sequences()
        for pool_id, pages in sequence.packed.items():
            assert len(pages)
            table.drop_pages(sequence, pool_id, pages)
        table.pools.forget_pools(set())
        assert not table.pools.packed
    cache.crop(40)
    assert cache.get_seq_length() == 40
