"""Forgetting the newest tokens of a page table, within a transaction: all of it or nothing."""

import numpy as np

from ..pages.page_pool import PagePool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from .layer_pools import LayerPools
from .page_table import PageTable
from .sequence_pages import SequencePages


def crop(table: PageTable, length: int) -> None:
    """Forget every token of a table at position `length` or later."""
    cut = Crop(table, length)
    cut.reserve()
    with table.transaction():
        cut.cut()


class Crop:
    """One crop of a table: forgets every token at position `length` or later, by its methods in their order.

    Parameters
    ----------
    table : PageTable
        Changed by :meth:`cut`.
    length : int
        The positions that stay.
    """

    def __init__(self, table: PageTable, length: int) -> None:
        self._table, self._length = table, length

    def reserve(self) -> None:
        """Make room for copies of the pages that are to be cut and that others hold too."""
        sequences = self._table.sequences()
        for pool_id, pool in self._table.pools.by_id().items():
            pool.reserve(sum(_copies_needed(pool, s.pages(pool_id), self._length) for s in sequences))

    def cut(self) -> None:
        """Take the pages from the sequences, within a transaction of the table, which can undo it."""
        pools = self._table.pools
        left = {id(s): _cropped(pools, s, self._length) for s in self._table.sequences()}
        for pool_id, pool in pools.by_id().items():
            ids = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(s.pages(pool_id) for s in left.values())]))
            if len(cut := ids[_has_beyond(pool, ids, self._length)]):
                pool.wipe(cut)
        self._table.replace_sequences(left)


def _tokens_before(pool: PagePool, ids: PageIds, length: int) -> PageIds:
    """Return for each of the pages `(n,)` how many of its tokens lie before position `length`."""
    positions = pool.positions[pool.index(ids)]
    return ((positions >= 0) & (positions < length)).sum(dim=1).cpu().numpy()


def _copies_needed(pool: PagePool, ids: PageIds, length: int) -> int:
    """Return how many of the pages are cut while others hold them too."""
    keep = _tokens_before(pool, ids, length)
    return int(((keep > 0) & (keep < pool.count[ids]) & (pool.allocator.refcount[ids] > 1)).sum())


def _cropped(pools: LayerPools, sequence: SequencePages, length: int) -> SequencePages:
    """Return the sequence with only its tokens before position `length`; it takes over the references.

    Counts are up to date; what pages have beyond them is not wiped yet.
    """
    # A pool all of whose pages were evicted may be gone, with its name still in the sequence.
    used = [pool_id for pool_id, ids in sequence.packed.items() if len(ids)]
    packed = {pool_id: np.array(list(_cut(pools, sequence, length, pool_id).values())) for pool_id in used}
    kept = _cut(pools, sequence, length, PLAIN)
    open_pages, full = _divide_shard_pages(pools, sequence, kept)
    window = [kept[page] for page in sequence.window if page in kept]
    packed = {pool_id: ids.astype(np.int64) for pool_id, ids in packed.items() if len(ids)}
    return SequencePages(window, open_pages, full, packed)


def _divide_shard_pages(pools: LayerPools, sequence: SequencePages, kept: dict[int, int]) -> tuple[PageIds, PageIds]:
    """Return the open pages `(S,)` and the full pages `(n,)` that are left, where `kept` maps old pages to new."""
    # Pages of a shard follow one another in time, so at most one page per shard is left partly filled.
    plain, open_pages, full = pools.plain, np.full_like(sequence.open, -1), []
    for page in [*sequence.full.tolist(), *sequence.open[sequence.open >= 0].tolist()]:
        if page in kept and plain.count[kept[page]] == plain.page_size:
            full.append(kept[page])
        elif page in kept and open_pages[plain.shard[page]] < 0:
            open_pages[plain.shard[page]] = kept[page]
        elif page in kept:
            # Of two parts one has given its pages of a shard to the other: it stays as it is, and is not packed.
            plain.incompressible[kept[page]] = True
            full.append(kept[page])
    return open_pages, np.asarray(full, dtype=np.int64)


def _cut(pools: LayerPools, sequence: SequencePages, length: int, pool_id: PoolId) -> dict[int, int]:
    """Release the pages of a pool that lie beyond `length`, shorten others; return old and new page numbers."""
    pool, ids = pools.by_id()[pool_id], sequence.pages(pool_id)
    keep = _tokens_before(pool, ids, length)
    kept = {int(page): int(page) for page in ids[keep > 0]}
    for page, count in zip(ids.tolist(), keep.tolist(), strict=True):
        if 0 < count < pool.count[page]:
            kept[page] = pool.copy_on_write(page, holders=1)
            pool.count[kept[page]] = count
    pool.decref(ids[keep == 0])
    return kept


def _has_beyond(pool: PagePool, ids: PageIds, length: int) -> np.ndarray:
    """Return for each of the pages `(n,)` whether it has a position of `length` or more."""
    return (pool.positions[pool.index(ids)] >= length).any(dim=1).cpu().numpy()
