"""Migration: full pages move from the part of a layer that has too many to the part that has too few."""

from collections.abc import Sequence

import numpy as np

from ..common.tensors import is_out_of_memory, to_device
from ..page_table.page_packing import adopt_pages
from ..page_table.page_table import PageTable
from ..page_table.sequence_pages import SequencePages
from ..pages.packed_pool import PackedPool
from ..pages.page_contents import PageContents
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from ..sharding.shard_map import MAX_SKEW, MIN_PAGES, ShardMap
from ..tiers.tier_limits import TierFull
from .layer_part import LayerPart

#: Pages that migrate at most at a time, while a layer's tokens go on by a page: about as long as a step takes, copies
#: to a GPU run beside it.
MAX_MIGRATED = 32


def migrate_pages(parts: Sequence[LayerPart], shard_map: ShardMap) -> int:
    """Move some full pages from the fullest part to the emptiest, if these are too far apart; return how many.

    Tokens stay where they are in their sequences, shards and pages; nothing is encoded again. Parts that evict keep to
    budgets of their own, and are left alone. Pages that other caches hold too would take memory twice: they stay.
    """
    if shard_map.whole or len(parts) < 2 or any(part.scheduler is not None and part.scheduler.budget for part in parts):
        return 0
    uneven = _uneven_parts(parts, shard_map)
    if uneven is None:
        return 0
    source, target, tokens = uneven
    here, there = source.table, target.table
    assert here is not None
    assert there is not None
    size, number = here.plain.page_size, target.location.number
    moved = _move_some(here, there, min(MAX_MIGRATED, tokens // size), shard_map.fractions[:, number])
    if moved:
        for pool_id in here.pools.by_id():
            here.pools.compact(pool_id)
        # Counts go with the pages, so that balance is judged by where tokens are.
        shard_map.placed[source.location.number] -= moved * size
        shard_map.placed[number] += moved * size
    return moved


def _uneven_parts(parts: Sequence[LayerPart], shard_map: ShardMap) -> tuple[LayerPart, LayerPart, int] | None:
    """Return the fullest part, the emptiest, and the tokens to move; None if they are even or have few tokens."""
    numbers = [part.location.number for part in parts]
    weights = shard_map.weights[numbers] / shard_map.weights[numbers].sum()
    loads = np.array([0 if part.table is None else _tokens_outside(part.table) for part in parts], dtype=np.float64)
    excess = loads - weights * loads.sum()
    source, target = int(excess.argmax()), int(excess.argmin())
    bound = MAX_SKEW * loads.sum() / len(parts)
    if loads.sum() < MIN_PAGES * shard_map.page_size * len(parts) or max(excess[source], -excess[target]) <= bound:
        return None
    return parts[source], parts[target], int(min(excess[source], -excess[target]))


def _move_some(here: PageTable, there: PageTable, wanted: int, preferred: np.ndarray) -> int:
    """Move `wanted` pages, as far as there are so many and there is memory for them; return how many moved."""
    moved = 0
    for pool_id, pages in _movable(here, preferred):
        taken = pages[: wanted - moved]
        if len(taken):
            try:
                _move(here, there, pool_id, taken)
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, TierFull) and not is_out_of_memory(error):
                    raise
                # They are well where they are.
                break
            moved += len(taken)
    return moved


def _tokens_outside(table: PageTable) -> int:
    """Return the tokens in the pages of the shards, shared ones counted once."""
    tokens = 0
    for pool_id, pool in table.pools.by_id().items():
        ids = table.distinct_pages(pool_id)
        tokens += int(pool.count[ids[pool.shard[ids] >= 0]].sum())
    return tokens


def _movable(table: PageTable, preferred: np.ndarray) -> list[tuple[PoolId, PageIds]]:
    """Return full pages by pool, those of shards of which the target is to have the largest fractions `(S,)` first."""
    found = []
    for pool_id, pool in table.pools.by_id().items():
        if isinstance(pool, PackedPool) and any(
            codec.basis is not None for codec in (pool.key_codec, pool.value_codec)
        ):
            # A basis is fitted in each part anew.
            continue
        own = np.zeros(pool.capacity, dtype=np.int64)
        for sequence in table.sequences():
            own[sequence.full_pages(pool_id)] += 1
        pages = np.flatnonzero((own > 0) & (own == pool.allocator.refcount) & (pool.count == pool.page_size))
        order = np.argsort(-preferred[pool.shard[pages]], kind="stable")
        found.append((pool_id, pages[order]))
    return found


def _move(here: PageTable, there: PageTable, pool_id: PoolId, pages: PageIds) -> None:
    """Move full pages of a pool between tables with the same rows."""
    target, ids = _copy(here, there, pool_id, pages)
    number = dict(zip(pages.tolist(), ids.tolist(), strict=True))
    for old, new in _pairs(here, there):
        mine = np.array([number[page] for page in old.full_pages(pool_id).tolist() if page in number], dtype=np.int64)
        if len(mine):
            there.add_pages(new, target, mine)
    for old, _ in _pairs(here, there):
        here.drop_pages(old, pool_id, np.intersect1d(old.full_pages(pool_id), pages))


def _copy(here: PageTable, there: PageTable, pool_id: PoolId, pages: PageIds) -> tuple[PoolId, PageIds]:
    """Copy pages with all that is known of them into a pool of another table; return it and their numbers there."""
    pool, device = here.pools.by_id()[pool_id], there.plain.device
    index = pool.index(pages)
    positions = to_device(pool.positions[index], device)
    if isinstance(pool, PackedPool):
        keys, values = (codes.map(lambda part: to_device(part, device)) for codes in pool.codes_at(index))
        taken, ids = adopt_pages(there.pools, pool, pages, keys, values)
        taken.positions[taken.index(ids)] = positions
        taken.count[ids] = pool.count[pages]
        target = taken.id
    else:
        contents = here.plain.contents(pages)
        k, v, experts = (to_device(part, device) for part in (contents.keys, contents.values, contents.experts))
        target, ids = PLAIN, there.plain.insert(PageContents(k, v, positions, experts, contents.shards))
        there.plain.incompressible[ids] = here.plain.incompressible[pages]
    there_pool = there.pools.by_id()[target]
    if pool.usage is not None and there_pool.usage is not None:
        there_pool.usage.copy_from(pool.usage, index, there_pool.index(ids))
    return target, ids


def _pairs(here: PageTable, there: PageTable) -> list[tuple[SequencePages, SequencePages]]:
    """Return the distinct sequences of two parts, which have the same rows alike."""
    return list(zip(here.sequences(), there.sequences(), strict=True))
