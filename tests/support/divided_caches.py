"""Caches in several parts that are saved, loaded on other devices and compared with what they were."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from saved_runs import go_on, new_cache, plain_state

from pikv_hf import PiKVCache
from pikv_hf.common.kv import KV
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.page_table.page_table import PageTable
from pikv_hf.serialization.pool_records import page_notes


def names(devices: int, first: int = 0) -> list[str]:
    return [f"cpu:{first + number}" for number in range(devices)]


def paged(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


def contents(table: PageTable | None) -> list[dict[str, Any]]:
    """Return all that is known of the pages of each row, in the order of the row's pages, without their numbers."""
    found = []
    for row in [] if table is None else table.rows:
        known: dict[str, Any] = {"window": len(row.window), "open": (row.open >= 0).tolist(), "full": len(row.full)}
        for name, pool in table.pools.by_id().items():
            if len(ids := row.pages(name)):
                notes = {part: note.pick(pool.index(ids)) for part, note in page_notes(pool).items()}
                known |= {f"{name}.{part}": note.numpy().tobytes() for part, note in notes.items()}
        found.append({**known, "same as": [row is other for other in table.rows]})
    return found


def capacities(cache: PiKVCache) -> list[int]:
    tables = [table for layer in paged(cache) for table in layer.store.tables()]
    return [pool.capacity for table in tables for pool in table.pools.by_id().values()]


def positions(cache: PiKVCache) -> list[list[list[int]]]:
    """Return which positions each row has in each part."""
    tables = [(layer.seen, table) for layer in paged(cache) for table in layer.store.tables()]
    return [[held.nonzero().flatten().tolist() for held in table.view.stored_mask(seen)] for seen, table in tables]


def assert_equal_layers(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    """Compare everything that a layer consists of but the numbers of its pages."""
    assert plain_state(mine) == plain_state(theirs)
    assert (mine.config, mine.store.padding()) == (theirs.config, theirs.store.padding())
    assert [part.location.number for part in mine.parts] == [part.location.number for part in theirs.parts]
    loads = mine.state.expert_loads, theirs.state.expert_loads
    assert (loads[0] is None) == (loads[1] is None)
    assert loads[0] is None or loads[0].tolist() == loads[1].tolist()
    assert_equal_shards(mine, theirs)
    for one, other in zip(mine.parts, theirs.parts, strict=True):
        assert contents(one.table) == contents(other.table)
        if one.table is not None:
            assert one.table.writer.reads_window == other.table.writer.reads_window
            assert one.table.writer._counts == other.table.writer._counts
            for which in KV:
                bases = one.table.pools.encoders.bases(which), other.table.pools.encoders.bases(which)
                assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))
        if one.scheduler is not None:
            assert vars(one.scheduler.policy) == vars(other.scheduler.policy)
            assert (one.scheduler.now, one.scheduler.pages_evicted) == (
                other.scheduler.now,
                other.scheduler.pages_evicted,
            )


def assert_equal_shards(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    assert (mine.store.shard_map is None) == (theirs.store.shard_map is None)
    if mine.store.shard_map is not None:
        one, other = vars(mine.store.shard_map), vars(theirs.store.shard_map)
        for name, value in one.items():
            assert value.tobytes() == other[name].tobytes() if isinstance(value, np.ndarray) else value == other[name]


def assert_counted(cache: PiKVCache) -> None:
    """Check that pages are held by as many sequences as their references say."""
    for table in [table for layer in paged(cache) for table in layer.store.tables()]:
        for name, pool in table.pools.by_id().items():
            held = np.concatenate([sequence.pages(name) for sequence in {id(s): s for s in table.rows}.values()])
            assert (pool.allocator.refcount == np.bincount(held, minlength=pool.capacity)).all()


def round_trip(
    model: Any, cache: PiKVCache, folder: Path, mask: torch.Tensor | None = None, steps: int = 14
) -> PiKVCache:
    """Save a cache, load it on other devices, compare, and go on with both alike."""
    path, parts = folder / "cache", paged(cache)[0].layout.parts
    cache.save(path)
    loaded = PiKVCache.load(path, model, devices=names(parts, first=3))
    assert [file.name for file in folder.iterdir()] == ["cache"]
    assert [part.location.name for part in paged(loaded)[0].parts] == names(parts, first=3)
    path.unlink()
    for mine, theirs in zip(paged(cache), paged(loaded), strict=True):
        assert_equal_layers(mine, theirs)
    assert_counted(loaded)
    as_it_lay = capacities(cache) == capacities(loaded)
    logits = go_on(model, cache, mask, steps), go_on(model, loaded, mask, steps)
    assert not as_it_lay or torch.equal(*logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert positions(cache) == positions(loaded)
    for mine, theirs in zip(paged(cache), paged(loaded), strict=True):
        assert_equal_shards(mine, theirs)
    assert_counted(loaded)
    return loaded


def spread_over(model: Any, devices: int, **options: Any) -> PiKVCache:
    cache = new_cache(model, **options)
    return PiKVCache.for_model(model, cache.pikv_config, devices=names(devices))
