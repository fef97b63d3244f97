"""A layer with a budget, and how many tokens its shards hold."""

import numpy as np
from fake_attachment import GROUPS, FakeAttachment

from pikv_hf.config import PiKVConfig
from pikv_hf.layer.joint_budget import join_budgets
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.page_scheduler import make_scheduler


def budgeted_layer(config: PiKVConfig) -> PiKVLayer:
    """Return an empty layer that is the only one of its cache."""
    layer = PiKVLayer(0, config, FakeAttachment())
    layer.parts[0].scheduler = make_scheduler(config, 1, 0, query_groups=GROUPS)
    join_budgets([layer])
    return layer


def shard_holdings(layer: PiKVLayer) -> np.ndarray:
    """Return the tokens that each sequence holds in each shard, means over KV heads, `(B, S)`."""
    table = layer.table
    held = np.zeros((len(table.rows), table.num_shards))
    for name, pool in table.pools.by_id().items():
        for row, sequence in enumerate(table.rows):
            for page in sequence.pages(name):
                if pool.shard[page] >= 0:
                    held[row, pool.shard[page]] += pool.count[page]
    return held.reshape(layer.batch, -1, table.num_shards).mean(1)
