"""The pages of a table's rows as lists that a compiled kernel walks along."""

import dataclasses
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


@dataclasses.dataclass(frozen=True, slots=True)
class ListedPages:
    """Lists of the pages of rows.

    Attributes
    ----------
    pools : tuple of PagePool
        Whose pages.
    lists : PageLists or None
        None where a compiled kernel cannot read them.
    stored : tuple
        The tensors and counts of the pools that the lists are of.
    """

    pools: tuple[PagePool, ...]
    lists: PageLists | None
    stored: tuple[tuple[object, object, object], ...]

    @classmethod
    def of_rows(cls, pools: Sequence[PagePool], pages: Sequence[Sequence[PageIds]], newest: PageIds) -> "ListedPages":
        """List pages, given by pool and row; decoding steps write to those `newest` `(n,)` of the plain pool."""
        # As in most steps, the plain pool alone may have pages.
        used = [index for index, of_pool in enumerate(pages) if any(map(len, of_pool))]
        some = tuple(pools[index] for index in used)
        stored = tuple(_stored(pool) for pool in some)
        listed = [listed_pool(pool, newest) for pool in some]
        how = {backend for backend, _ in listed}
        left_to_torch = len(how) != 1 or "torch" in how
        if left_to_torch or ("numba" in how and _are_shared(some, [pages[index] for index in used])):
            return cls(some, None, stored)
        by_row = [
            np.concatenate([pages[index][row] | (number << 32) for number, index in enumerate(used)])
            for row in range(len(pages[0]))
        ]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in by_row], dtype=np.int64)])
        readable = [pool for _, pool in listed if pool is not None]
        lists = PageLists(readable, np.concatenate(by_row), starts, len(by_row), how.pop())
        return cls(some, lists, stored)

    def is_current(self) -> bool:
        """Return whether the pools still hold what the lists are of: they have not grown, nor given anything back."""
        for pool, (keys, values, counts) in zip(self.pools, self.stored, strict=True):
            if pool.count is not counts or pool.keys is not keys or pool.values is not values:  # type: ignore[attr-defined]
                return False
        return True


def _are_shared(pools: Sequence[PagePool], pages: Sequence[Sequence[PageIds]]) -> bool:
    """Return whether all pages are as they came, and each on average in two rows or more."""
    if len(pages[0]) == 1 or not all(isinstance(pool, PlainPool) for pool in pools):
        return False
    listed = [np.concatenate(of_pool) for of_pool in pages]
    distinct = [len(np.unique(numbers)) for numbers in listed]
    stored = sum(pool.page_bytes * count for pool, count in zip(pools, distinct, strict=True))
    return sum(map(len, listed)) >= 2 * sum(distinct) and stored >= SHARED_BYTES


def _stored(pool: PagePool) -> tuple[object, object, object]:
    assert isinstance(pool, PlainPool | PackedPool)
    return pool.keys, pool.values, pool.count


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
