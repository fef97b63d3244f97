"""The pages of a table's rows as lists that a compiled kernel walks along."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..kernels.dispatch import choose
from ..kernels.page_codes import PageCodes
from ..kernels.page_lists import ListedPool, PageLists, is_listable
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds


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
    def of_rows(cls, pools: Sequence[PagePool], pages: Sequence[Sequence[PageIds]]) -> "ListedPages":
        """List pages, given by pool and row."""
        # As in most steps, the plain pool alone may have pages.
        used = [index for index, of_pool in enumerate(pages) if any(map(len, of_pool))]
        some = tuple(pools[index] for index in used)
        stored = tuple(_stored(pool) for pool in some)
        listed = [_listed(pool) for pool in some]
        if not listed or any(pool is None for pool in listed):
            return cls(some, None, stored)
        by_row = [
            np.concatenate([pages[index][row] | (number << 32) for number, index in enumerate(used)])
            for row in range(len(pages[0]))
        ]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in by_row], dtype=np.int64)])
        lists = PageLists([pool for pool in listed if pool is not None], np.concatenate(by_row), starts, len(by_row))
        return cls(some, lists, stored)

    def is_current(self) -> bool:
        """Return whether the pools still hold what the lists are of: they have not grown, nor given anything back."""
        for pool, (keys, values, counts) in zip(self.pools, self.stored, strict=True):
            if pool.count is not counts or pool.keys is not keys or pool.values is not values:  # type: ignore[attr-defined]
                return False
        return True


def _stored(pool: PagePool) -> tuple[object, object, object]:
    assert isinstance(pool, PlainPool | PackedPool)
    return pool.keys, pool.values, pool.count


def _listed(pool: PagePool) -> ListedPool | None:
    """Return what lists refer to for a pool, None if compiled kernels do not read it, or it is not to be."""
    if isinstance(pool, PlainPool):
        parts = PageCodes("none", pool.page_size, pool.keys), PageCodes("none", pool.page_size, pool.values)
    elif type(pool) is PackedPool:
        parts = pool.keys, pool.values
    else:
        # Pages of tiers move.
        return None
    listable = is_listable(*parts)
    if choose(pool.device, compiled=listable) != "numba":
        return None
    return ListedPool(*parts, pool.count)
