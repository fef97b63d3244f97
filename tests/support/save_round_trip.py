"""Saves and loads a cache and compares everything that it consists of, at once and after going on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from saved_runs import go_on, plain_state

from pikv_hf import PiKVCache
from pikv_hf.common.kv import KV
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_list import row_count
from pikv_hf.serialization.pool_records import most_pages, page_notes


def pages_by_row(layer: PiKVLayer) -> list[dict[str, Any]]:
    """Return all that is known of the pages of each row, in the order of the row's pages, without their numbers."""
    found = []
    for row in layer.table.rows:
        pages = {"window": len(row.window), "open": (row.open >= 0).tolist(), "full": len(row.full)}
        for name, pool in layer.table.pools.by_id().items():
            ids = row.pages(name)
            if len(ids):
                notes = {part: note.pick(pool.index(ids)).numpy() for part, note in page_notes(pool).items()}
                pages |= {f"{name}.{part}": note.tobytes() for part, note in notes.items()}
        found.append(pages)
    return found


def assert_equal(one: PiKVCache, other: PiKVCache) -> None:
    """Compare everything that a cache consists of; numbers bit by bit."""
    assert one.pikv_config == other.pikv_config
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        if not isinstance(mine, PiKVLayer):
            assert mine.is_initialized == theirs.is_initialized
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert not mine.is_initialized or torch.equal(mine.keys, theirs.keys)
            assert not mine.is_initialized or torch.equal(mine.values, theirs.values)
            continue
        assert plain_state(mine) == plain_state(theirs)
        assert mine.config == theirs.config
        assert (mine.table is None) == (theirs.table is None)
        if mine.table is not None:
            assert_same_tables(mine, theirs)
    ours, theirs = one.memory_report(), other.memory_report()
    assert theirs.total <= ours.total
    for name in ("tokens_stored", "tokens_seen", "shard_tokens", "shards", "device", "kind"):
        assert [getattr(a, name) for a in ours.layers] == [getattr(b, name) for b in theirs.layers], name


def assert_same_tables(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    for name in ("heads", "dtype", "device", "lanes"):
        assert getattr(mine.store, name) == getattr(theirs.store, name)
    assert mine.store.padding() == theirs.store.padding()
    assert torch.equal(mine.stored_mask(), theirs.stored_mask())
    for one, other in zip(mine.dense(), theirs.dense(), strict=True):
        assert torch.equal(one, other)
    tables = mine.table, theirs.table
    assert tables[0].tokens() == tables[1].tokens()
    assert pages_by_row(mine) == pages_by_row(theirs)
    shared = [[[a is b for b in table.rows] for a in table.rows] for table in tables]
    assert shared[0] == shared[1]
    writers = [(t.writer.num_shards, t.writer.recent_window, t.writer.sink_pages) for t in tables]
    assert writers[0] == writers[1]
    stores = [table.pools for table in tables]
    encoders = [pools.encoders for pools in stores]
    assert stores[0].config == stores[1].config
    for which in KV:
        for one, other in zip(encoders[0].bases(which), encoders[1].bases(which), strict=True):
            assert torch.equal(one, other)
    assert (encoders[0].queries is None) == (encoders[1].queries is None)
    if encoders[0].queries is not None:
        assert torch.equal(encoders[0].queries, encoders[1].queries)
        assert encoders[0].query_scale == encoders[1].query_scale


def assert_compact(cache: PiKVCache) -> None:
    """Check that all pages are held, and by as many sequences as their references say."""
    for layer in cache.layers:
        table = getattr(layer, "table", None)
        for name, pool in ({} if table is None else table.pools.by_id()).items():
            held = np.concatenate([sequence.pages(name) for sequence in table.sequences()])
            assert (pool.allocator.refcount == np.bincount(held, minlength=pool.capacity)).all()
            assert pool.capacity <= most_pages(len(np.unique(held)))


def tokens_by_row(cache: PiKVCache) -> list[list[int]]:
    return [layer.table.tokens() for layer in cache.layers if getattr(layer, "table", None) is not None]


def capacities(cache: PiKVCache) -> list[list[int]]:
    tables = [layer.table for layer in cache.layers if getattr(layer, "table", None) is not None]
    return [[pool.capacity for pool in table.pools.by_id().values()] for table in tables]


def assert_go_on_alike(
    model: Any, one: PiKVCache, other: PiKVCache, mask: torch.Tensor | None = None, shares: bool = False
) -> None:
    """Go on with both caches: the same tokens, and the very same logits where pages lie as they did."""
    as_it_lay = not shares and capacities(one) == capacities(other)
    logits = go_on(model, one, mask), go_on(model, other, mask)
    if as_it_lay:
        assert torch.equal(*logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    # Else pages lie closer together than they did, so that sums may be taken in another order.
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert tokens_by_row(one) == tokens_by_row(other)


def round_trip(
    model: Any, cache: PiKVCache, folder: Path, mask: torch.Tensor | None = None, shares: bool = False
) -> PiKVCache:
    """Save and load a cache, compare, go on with both and compare again; returns what was loaded.

    `shares` tells that other caches hold its pages, which are then copied before they are written to.
    """
    path = folder / "cache.safetensors"
    cache.save(path)
    loaded = PiKVCache.load(path, model)
    assert [file.name for file in folder.iterdir()] == [path.name]
    assert_equal(cache, loaded)
    assert_compact(loaded)
    # What was loaded has nothing to do with the file any more.
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    # Of both, so that both copy pages.
    _, fork = cache.fork(), loaded.fork()
    assert_go_on_alike(model, cache, loaded, mask, shares)
    assert_usable(model, fork, mask)
    return loaded


@torch.no_grad()
def assert_usable(model: Any, cache: PiKVCache, mask: torch.Tensor | None) -> None:
    """Select rows, crop and go on."""
    if row_count(cache.layers) is None:
        return
    cache.batch_select_indices(torch.tensor([0]))
    before = cache.get_seq_length()
    go_on(model, cache, None if mask is None else mask[:1], steps=2)
    if not any(layer.is_sliding for layer in cache.layers):
        cache.crop(before - cache.get_seq_length())
        assert cache.get_seq_length() == before
    assert all(layer.batch == 1 for layer in cache.layers if isinstance(layer, PiKVLayer))
