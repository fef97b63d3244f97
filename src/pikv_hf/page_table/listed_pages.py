"""The pages of a table's rows as lists that a compiled kernel walks along."""

from collections.abc import Sequence

import numpy as np

from ..kernels.dispatch import Backend, choose
from ..kernels.page_codes import PageCodes, coded_dims
from ..kernels.page_lists import ListedPool, PageLists, is_listable
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds

#: Pages as they came that several rows share are left to matrix products, which read them once for all of these rows,
#: where they are more than a processor's cache holds: from so many bytes on.
SHARED_BYTES = 16 * 1024 * 1024


class ListedPages:
    """Lists of the pages of rows, until a pool has other tensors: lists would keep the old ones in memory.

    Attributes
    ----------
    lists : PageLists or None
        None where a compiled kernel cannot read them.
    is_current : bool
        Whether the pools still have the tensors that the lists are of.
    """

    def __init__(self, lists: PageLists | None, pools: Sequence[PagePool] = ()) -> None:
        self.lists, self.is_current = lists, True
        for pool in pools:
            pool.follow(self)

    @classmethod
    def of_rows(cls, pools: Sequence[PagePool], pages: Sequence[Sequence[PageIds]], newest: PageIds) -> "ListedPages":
        """List pages, given by pool and row; decoding steps write to those `newest` `(n,)` of the plain pool."""
        # As in most steps, the plain pool alone may have pages.
        used = [index for index, of_pool in enumerate(pages) if any(map(len, of_pool))]
        some = [pools[index] for index in used]
        listed = [listed_pool(pool, newest) for pool in some]
        how = {backend for backend, _ in listed}
        left_to_torch = len(how) != 1 or "torch" in how
        if left_to_torch or ("numba" in how and _are_shared(some, [pages[index] for index in used])):
            return cls(None)
        by_row = [
            np.concatenate([pages[index][row] | (number << 32) for number, index in enumerate(used)])
            for row in range(len(pages[0]))
        ]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in by_row], dtype=np.int64)])
        readable = [pool for _, pool in listed if pool is not None]
        return cls(PageLists(readable, np.concatenate(by_row), starts, len(by_row), how.pop()), some)

    def drop(self) -> None:
        """Forget the lists: a pool is about to have other tensors."""
        self.lists, self.is_current = None, False


def _are_shared(pools: Sequence[PagePool], pages: Sequence[Sequence[PageIds]]) -> bool:
    """Return whether all pages are as they came, and each on average in two rows or more."""
    if len(pages[0]) == 1 or not all(isinstance(pool, PlainPool) for pool in pools):
        return False
    listed = [np.concatenate(of_pool) for of_pool in pages]
    distinct = [len(np.unique(numbers)) for numbers in listed]
    stored = sum(pool.page_bytes * count for pool, count in zip(pools, distinct, strict=True))
    return sum(map(len, listed)) >= 2 * sum(distinct) and stored >= SHARED_BYTES


def listed_pool(pool: PagePool, newest: PageIds) -> tuple[Backend, ListedPool | None]:
    """Return what reads the lists of a pool, and what they refer to; torch, which reads none, if nothing else does."""
    growing = newest[:0]
    if isinstance(pool, PlainPool):
        parts = PageCodes("none", pool.page_size, pool.keys), PageCodes("none", pool.page_size, pool.values)
        growing = newest
    elif type(pool) is PackedPool:
        parts = pool.keys, pool.values
    else:
        # Pages of tiers move.
        return "torch", None
    how = choose(pool.device, None, coded_dims(*parts), compiled=is_listable(*parts))
    return how, ListedPool(*parts, pool.count, growing)
