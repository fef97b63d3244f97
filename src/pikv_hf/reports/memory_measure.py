"""Measuring what a layer holds."""

from typing import Any

import numpy as np

from ..common.kv import KV
from ..common.tensors import live_bytes
from ..layer.layer import PiKVLayer
from ..layer.layer_reads import storages
from ..layer.own_layer import has_positions, is_state_layer, state_tensors, tensors_of
from ..page_table.page_table import PageTable
from ..pages.packed_pool import PackedPool
from ..pages.pool_id import PLAIN
from .memory_report import CodecMemory, LayerMemory


def layer_memory(index: int, layer: Any) -> list[LayerMemory]:
    """Return the bytes and tokens of a layer, a :class:`PiKVLayer` part by part, or one of transformers' own."""
    if not isinstance(layer, PiKVLayer):
        return [_own_memory(index, layer)]
    if layer.table is None:
        return [LayerMemory(index, "paged", "-", tokens_seen=layer.seen)]
    return [_part_memory(index, layer, number, table) for number, table in enumerate(layer.store.tables())]


def _part_memory(index: int, layer: PiKVLayer, number: int, table: PageTable) -> LayerMemory:
    pages, plain = table.pools, table.plain
    pools = pages.by_id()
    in_use = {pool_id: table.distinct_pages(pool_id) for pool_id in pools}
    packed_keys = [tensor for pool in pages.packed.values() for tensor in pool.keys.tensors()]
    packed_values = [tensor for pool in pages.packed.values() for tensor in pool.values.tensors()]
    keys = live_bytes([plain.keys, *packed_keys, *pages.encoders.bases(KV.KEYS)])
    values = live_bytes([plain.values, *packed_values, *pages.encoders.bases(KV.VALUES)])
    tensors = storages(layer.store, number)
    total = live_bytes(tensors) + pages.host_bytes + table.host_bytes
    pending = live_bytes(tensors) - live_bytes(pages.tensors())
    shard_bytes, shard_tokens = np.zeros((2, table.num_shards), dtype=np.int64)
    for pool_id, pool in pools.items():
        in_shard = in_use[pool_id][pool.shard[in_use[pool_id]] >= 0]
        np.add.at(shard_bytes, pool.shard[in_shard], pool.page_bytes)
        np.add.at(shard_tokens, pool.shard[in_shard], pool.count[in_shard])
    in_window = plain.shard[in_use[PLAIN]] < 0
    # Copies of the window are memory, but its tokens count once.
    stored = sum(int(pool.count[in_use[pool_id]].sum()) for pool_id, pool in pools.items())
    if not table.writer.reads_window:
        stored -= int(plain.count[in_use[PLAIN][in_window]].sum())
    return LayerMemory(
        layer=index,
        kind="paged",
        device=layer.parts[number].location.name or str(plain.device),
        keys=keys,
        values=values,
        metadata=total - keys - values - pending,
        total=total,
        window=plain.page_bytes * int(np.count_nonzero(in_window)),
        free=sum(pool.free_bytes for pool in pools.values()),
        pending=pending,
        shards=tuple(shard_bytes.tolist()),
        shard_tokens=tuple(shard_tokens.tolist()),
        tokens_seen=layer.seen,
        tokens_stored=stored,
        codecs=(
            _plain_codec(table, in_use[PLAIN]),
            *(_codec(pool, in_use[pool_id]) for pool_id, pool in pages.packed.items()),
        ),
    )


def _own_memory(index: int, layer: Any) -> LayerMemory:
    """Return what a layer of transformers' own holds: K/V of a window, states, or nothing."""
    tensors, states = tensors_of(layer), state_tensors(layer)
    keys, values = (live_bytes([tensors[name]] if name in tensors else []) for name in ("keys", "values"))
    counted = tensors.get("keys")
    return LayerMemory(
        layer=index,
        kind="state" if is_state_layer(layer) else "sliding" if has_positions(layer) else "none",
        device=str(next(iter(tensors.values())).device) if tensors else "-",
        keys=keys,
        values=values,
        state=live_bytes(states.values()),
        total=live_bytes(tensors.values()),
        window=keys + values,
        tokens_seen=layer.get_seq_length() if has_positions(layer) else 0,
        tokens_stored=counted.shape[0] * counted.shape[-2] if counted is not None and counted.numel() else 0,
    )


def _plain_codec(table: PageTable, ids: np.ndarray) -> CodecMemory:
    pool = table.plain
    heads, _, size, dim = pool.keys.shape
    key_bytes = heads * size * dim * pool.keys.element_size()
    tokens = int(pool.count[ids].sum())
    return CodecMemory("none", len(ids), tokens, key_bytes * len(ids), (pool.page_bytes - key_bytes) * len(ids))


def _codec(pool: PackedPool, ids: np.ndarray) -> CodecMemory:
    key_bytes = sum(t.element_size() * t.shape[0] * t[:1, :1].shape[2:].numel() for t in pool.keys.tensors())
    errors = pool.errors[ids].astype(np.float64)
    logits = errors[:, 4][np.isfinite(errors[:, 4])]
    return CodecMemory(
        pool.name,
        len(ids),
        int(pool.count[ids].sum()),
        key_bytes * len(ids),
        (pool.page_bytes - key_bytes) * len(ids),
        tuple(np.nansum(errors[:, :4], axis=0).tolist()),
        float(logits.sum()),
        len(logits),
    )
