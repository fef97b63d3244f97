"""The free list of a pool of pages: which page numbers are free, and how many sequences refer to each of the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .types import PageIds


class PageAllocator:
    """Hands out page numbers and counts who refers to each page; a page that nobody refers to is free.

    It knows nothing of what pages hold, nor how large they are: :class:`PagePool` has one and keeps the contents.

    Attributes
    ----------
    refcount : numpy.ndarray
        `(N,)` int32, the sequences that refer to each page, 0 for a free one.
    allocations : int
        How often pages were allocated or given other numbers: while it stands, free pages stay free.
    """

    def __init__(self) -> None:
        self.refcount = np.zeros(0, dtype=np.int32)
        self.allocations = 0
        # Pages in use when the running transaction began: should it fail, those who refer to them want them unchanged.
        self._spared = np.zeros(0, dtype=np.bool_)

    @property
    def capacity(self) -> int:
        """N, free pages and others."""
        return len(self.refcount)

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated without growing."""
        return int(np.count_nonzero(self.free_mask()))

    @property
    def spares_pages(self) -> bool:
        """Whether a transaction is running that began with pages in use; these are not free before it ends."""
        return bool(len(self._spared))

    def free_mask(self) -> np.ndarray:
        """Return `(N,)` bool, the pages that can be allocated."""
        free = self.refcount == 0
        free[: len(self._spared)] &= ~self._spared
        return free

    def resize(self, pages: int, kept: PageIds | None = None) -> None:
        """Have so many pages: those `kept` `(n,)`, by default all, in this order, then free ones."""
        held = self.refcount if kept is None else self.refcount[kept]
        self.refcount = np.append(held, np.zeros(pages - len(held), dtype=np.int32))
        self.allocations += 1

    def allocate(self, pages: int, after: int = -1, holders: int = 1) -> PageIds:
        """Take free pages, side by side where possible.

        Parameters
        ----------
        pages : int
            How many; as many must be free.
        after : int
            A page whose right-hand neighbours are preferred, so that a sequence stays in one piece.
        holders : int
            Their reference count; with 0 they can be allocated again until somebody refers to them.

        Returns
        -------
        numpy.ndarray
            `(pages,)` int64 page numbers.
        """
        free = self.free_mask()
        if after >= 0 and free[after + 1 : after + 1 + pages].sum() == pages:
            ids = np.arange(after + 1, after + 1 + pages)
        else:
            ids = _first_run(np.flatnonzero(free), pages)
        self.refcount[ids] = holders
        self.allocations += 1
        return ids

    def incref(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        np.add.at(self.refcount, ids, 1)

    def decref(self, ids: PageIds) -> PageIds:
        """Drop a reference to each page; return those of `ids` that nobody refers to any more."""
        np.subtract.at(self.refcount, ids, 1)
        assert (self.refcount[ids] >= 0).all(), "a page was released more often than referred to"
        return ids[self.refcount[ids] == 0]

    def hand_over(self, page: int, copy: int, holders: int) -> None:
        """Let `holders` of the sequences that refer to a page refer to its copy instead."""
        self.refcount[copy] = holders
        self.refcount[page] -= holders

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of references if the block raises; pages added meanwhile are free then."""
        before = self.refcount.copy()
        outer, self._spared = self._spared, before > 0
        self._spared[: len(outer)] |= outer
        try:
            yield
        except BaseException:
            self.refcount[: len(before)] = before
            self.refcount[len(before) :] = 0
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
