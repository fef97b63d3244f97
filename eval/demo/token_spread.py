"""Where a cache's tokens are: how many each shard, each expert and the window have."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.reports.memory_report import LayerMemory


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpread:
    """Where a layer's tokens are after the context has been read.

    Attributes
    ----------
    layer : int
        The model layer.
    window_tokens : int
        Tokens in the sink and recent pages, which belong to no shard yet.
    shard_tokens : tuple of int
        Tokens of each shard.
    expert_tokens : tuple of int
        Tokens of each primary expert, the window's included; empty if the layer does not follow a router.
    """

    layer: int
    window_tokens: int
    shard_tokens: tuple[int, ...]
    expert_tokens: tuple[int, ...]


def token_spread(cache: PiKVCache) -> Iterator[LayerSpread]:
    """Yield how each paged layer's tokens spread over shards and experts."""
    parts: dict[int, list[LayerMemory]] = {}
    for part in cache.memory_report().layers:
        parts.setdefault(part.layer, []).append(part)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PiKVLayer):
            of_shards = np.sum([part.shard_tokens for part in parts[index]], axis=0)
            stored = sum(part.tokens_stored for part in parts[index])
            shards = tuple(int(tokens) for tokens in np.atleast_1d(of_shards))
            yield LayerSpread(index, stored - sum(shards), shards, _expert_tokens(layer))


def _expert_tokens(layer: PiKVLayer) -> tuple[int, ...]:
    if not layer.has_expert_router or layer.attachment is None or layer.table is None:
        return ()
    counts = np.zeros(layer.attachment.expert_routers[layer.layer_idx].num_experts, dtype=np.int64)
    for table in layer.store.tables():
        pool, held = table.plain, table.distinct_pages()
        if not table.writer.reads_window:
            held = held[pool.shard[held] >= 0]
        experts, positions = (tensor.cpu().numpy()[held] for tensor in (pool.experts, pool.positions))
        counts += np.bincount(experts[(positions >= 0) & (experts >= 0)], minlength=len(counts))
    return tuple(counts.tolist())
