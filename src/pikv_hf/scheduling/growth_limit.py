"""By how many bytes the pools of a layer may still grow."""

import weakref
from typing import TYPE_CHECKING

from ..reports.memory_report import live_bytes
from .layer_budget import LayerBudget

if TYPE_CHECKING:
    from ..page_table.layer_pools import LayerPools
    from .page_scheduler import PageScheduler


class BudgetError(RuntimeError):
    """What may not be evicted takes more than the budget."""


class GrowthLimit:
    """Tells the pools of a store by how many bytes they may grow.

    Forks share a store, and each brings a budget of its own: what they hold together stays within the sum.

    Parameters
    ----------
    pages : LayerPools
        The pools.
    limit : LayerBudget
        In bytes.
    """

    def __init__(self, pages: "LayerPools", limit: LayerBudget) -> None:
        self._pages, self._limit = weakref.ref(pages), limit
        # Rows of the table of each layer that has pages here.
        self._users: weakref.WeakKeyDictionary[PageScheduler, int] = weakref.WeakKeyDictionary()

    def admit(self, scheduler: "PageScheduler", rows: int) -> None:
        """Count the budget of a layer with so many rows.

        Raises
        ------
        BudgetError
            If it is less than what is never evicted of these rows, naming both; nothing has changed then.
        """
        if self._users.get(scheduler) == rows:
            return
        most, least = self._budget(rows), self._least(scheduler, rows)
        if most < least:
            raise BudgetError(
                f"a budget of {self._limit.total_bytes} bytes per layer leaves {most} for pages, but sinks, window and "
                f"what else cannot go of {rows} rows may take {least}"
            )
        self._users[scheduler] = rows

    def _store(self) -> "LayerPools":
        pages = self._pages()
        assert pages is not None
        return pages

    def _budget(self, rows: int) -> int:
        """Return the bytes for pages of so many rows: bounded sliding layers have theirs beside them."""
        assert self._limit.total_bytes is not None
        plain = self._store().plain
        return self._limit.total_bytes - int(self._limit.sliding_tokens * rows * plain.page_bytes / plain.page_size)

    def _least(self, scheduler: "PageScheduler", rows: int) -> int:
        """Return what may be needed while nothing can go: a page that leaves the window may begin one per shard."""
        pages = self._store()
        size = pages.plain.page_size
        needed = -(-self._limit.least // size) + 2 + min(size, self._limit.shards)
        beside = pages.most_beside + scheduler.most_beside(pages.plain, rows)
        return rows * needed * pages.plain.full_page_bytes + beside

    def __call__(self) -> int:
        """Return the bytes; less than 0 if what there is exceeds the budget."""
        users = dict(self._users)
        queries = sum(live_bytes(scheduler.tensors()) for scheduler in users)
        return sum(map(self._budget, users.values())) - self._store().nbytes - queries
