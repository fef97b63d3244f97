"""Who holds the pages of a pool: allocation, references, and undoing both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .page_storage import PageStorage
from .types import PageIds

# A pool that runs out of pages grows by a share of its size, at least by MIN_GROWTH pages.
MIN_GROWTH = 4


class NoRoomError(Exception):
    """A pool may not grow: so many pages have to go first."""

    def __init__(self, pool: "PagePool", pages: int) -> None:
        super().__init__(f"{pages} pages too few of {pool.capacity}")
        self.pool, self.pages = pool, pages


class PagePool(PageStorage):
    """Allocation and reference counts of the pages of one layer on one device; a subclass keeps their K/V.

    Parameters
    ----------
    page_size : int
        Tokens per page.
    device : torch.device
        Where the pages live.
    growth : float
        The share of its size by which the pool grows. Small steps waste little memory, and copying the pool once every
        few hundred tokens costs less than reading it at each.
    keeps_experts : bool
        Whether tokens may still move to the shards of their experts.

    Attributes
    ----------
    allocations : int
        Calls of :meth:`allocate` so far: while it stands, free pages stay as they are.
    growth_limit : callable, optional
        Returns the bytes by which the pool may grow; without one there is no limit.
    """

    def __init__(self, page_size: int, device: torch.device, growth: float, keeps_experts: bool = True) -> None:
        super().__init__(page_size, device, keeps_experts)
        self.growth = growth
        self.allocations = 0
        self.growth_limit: Callable[[], int] | None = None
        # Pages that were held when the running transaction began: should it fail, their owners want them as they are.
        self._spared = np.zeros(0, dtype=np.bool_)

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated without growing."""
        return int(np.count_nonzero(self._free()))

    def _free(self) -> np.ndarray:
        free = self.refcount == 0
        free[: len(self._spared)] &= ~self._spared
        return free

    @property
    def free_bytes(self) -> int:
        """Bytes of K/V in memory that no page uses."""
        return self.page_bytes * self.free_pages

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` can be allocated without growing. Out of memory leaves the pool as it was.

        Raises
        ------
        NoRoomError
            If the pool would have to grow beyond what `growth_limit` says.
        """
        missing = pages - self.free_pages
        if missing > 0:
            # The first reservation is exact (a prompt whose size is known); later ones leave room for what follows.
            slack = max(MIN_GROWTH, int(self.capacity * self.growth)) if self.capacity else 0
            extra = max(missing, slack)
            if self.growth_limit is not None:
                most = max(0, self.growth_limit() // self.full_page_bytes)
                if missing > most:
                    raise NoRoomError(self, missing - most)
                extra = min(extra, most)
            self._grow(extra)

    def trim(self) -> None:
        """Give back the free pages at the end."""
        held = np.flatnonzero(~self._free())
        end = int(held[-1]) + 1 if len(held) else 0
        if end < self.capacity:
            self._cut(end)

    def allocate(self, pages: int, after: int = -1, shard: int = -1) -> PageIds:
        """Take free pages, side by side where possible.

        Parameters
        ----------
        pages : int
            How many.
        after : int
            A page whose right-hand neighbours are preferred, so that a sequence stays in one piece.
        shard : int
            The shard they will belong to, -1 for the window.

        Returns
        -------
        numpy.ndarray
            `(pages,)` int64 page numbers, each with a reference count of 1 and no tokens.
        """
        self.reserve(pages)
        free = self._free()
        if after >= 0 and free[after + 1 : after + 1 + pages].sum() == pages:
            ids = np.arange(after + 1, after + 1 + pages)
        else:
            ids = _first_run(np.flatnonzero(free), pages)
        self.refcount[ids] = 1
        self.count[ids] = 0
        self.shard[ids] = shard
        self.wipe(ids)
        for companion in self.companions():
            companion.reset(ids)
        self.used[ids] = True
        self.allocations += 1
        return ids

    def incref(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        np.add.at(self.refcount, ids, 1)

    def decref(self, ids: PageIds) -> None:
        """Drop a reference to each page; pages without one are free and hold no tokens."""
        np.subtract.at(self.refcount, ids, 1)
        assert (self.refcount[ids] >= 0).all(), "a page was released more often than held"
        self.count[ids[self.refcount[ids] == 0]] = 0

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1."""
        new = int(self.allocate(1, shard=int(self.shard[page]))[0])
        self._copy_page(page, new)
        return new

    def own(self, page: int, holders: int) -> int:
        """Return a page with this one's content that only `holders` sequences hold; they swap it for theirs."""
        if self.refcount[page] == holders:
            return page
        copy = self.copy_page(page)
        self.refcount[copy] = holders
        self.refcount[page] -= holders
        return copy

    def move_pages(self, sources: PageIds, targets: PageIds) -> None:
        """Give pages `(n,)` other numbers, of pages that are free; those that they had are free then."""
        self._move_pages(sources, targets)
        self.refcount[sources], self.count[sources] = 0, 0
        self.allocations += 1

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of counts, references and statistics if the block raises.

        K/V need no undo: a block only writes to slots that no count covered at its start.
        """
        before = self.refcount.copy(), self.count.copy(), self.shard.copy()
        known = None if self.usage is None else self.usage.snapshot()
        outer, self._spared = self._spared, before[0] > 0
        self._spared[: len(outer)] |= outer
        try:
            yield
        except BaseException:
            self.refcount[: len(before[0])], self.count[: len(before[1])], self.shard[: len(before[2])] = before
            self.refcount[len(before[0]) :] = 0
            self.count[len(before[0]) :] = 0
            if known is not None and self.usage is not None:
                self.usage.restore(known)
            beyond = torch.arange(self.page_size, device=self.device) >= self.index(self.count)[:, None]
            self.positions.masked_fill_(beyond, -1)
            self.experts.masked_fill_(beyond[:, : self.experts.shape[1]], -1)
            raise
        finally:
            self._spared = outer


def _first_run(free: PageIds, pages: int) -> PageIds:
    """Return the first `pages` neighbouring numbers in sorted `free`, or its first ones if there is no such run."""
    if pages > 1 and len(free) > pages:
        starts = np.flatnonzero(free[pages - 1 :] - free[: len(free) - pages + 1] == pages - 1)
        if len(starts):
            return free[starts[0] : starts[0] + pages]
    return free[:pages]
