"""By how many bytes the pools of a layer may still grow."""

import weakref

from ..common.budget import bytes_text
from ..common.tensors import live_bytes
from ..page_table.layer_pools import LayerPools
from .layer_budget import LayerBudget
from .shared_budget import BudgetUser

#: While layers decide together what they keep, which is measured then.
_UNLIMITED = 1 << 60


class BudgetError(RuntimeError):
    """What may not be evicted takes more than the budget."""


class GrowthLimit:
    """Tells the pools of a layer by how many bytes they may grow.

    Forks share the pools, and each brings a budget of its own: what they hold together stays within the sum.

    Parameters
    ----------
    pages : LayerPools
        The pools.
    layer_budget : LayerBudget
        In bytes.
    """

    def __init__(self, pages: LayerPools, layer_budget: LayerBudget) -> None:
        self._pages, self._layer_budget = weakref.ref(pages), layer_budget
        # Rows of the table of each layer that has pages here.
        self._users: weakref.WeakKeyDictionary[BudgetUser, int] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[BudgetUser] | None = None

    def admit(self, user: BudgetUser, rows: int) -> None:
        """Count the budget of a layer with so many rows.

        Raises
        ------
        BudgetError
            If it is less than what is never evicted of these rows, naming the smallest that is not; nothing has changed
            then.
        """
        self._last = weakref.ref(user)
        if self._users.get(user) == rows:
            return
        missing = self._least(user, rows) - self._budget(rows)
        # What is decided together is measured then.
        if missing > 0 and not (user.shared is not None and user.shared.deciding):
            raise BudgetError(self._too_small(rows, missing))
        self._users[user] = rows

    def _too_small(self, rows: int, missing: int) -> str:
        """Return what to say of a budget that is so many bytes too small in this layer."""
        budget, plain = self._layer_budget, self._layer_pools().plain
        assert budget.total_bytes is not None
        # Pages of one head belong to a head's own row.
        what = "sequence" if plain.keys.shape[0] > 1 else "KV head"
        needed = bytes_text((budget.total_bytes + missing) * budget.divided_by)
        return (
            f"budget={budget.asked_for!r} is too small for {rows} {what}{'s' if rows > 1 else ''}: sinks, recent "
            f"window and pages that are being filled are never evicted, and need budget={needed!r} at the least; lower "
            f"recent_window=, sink_tokens=, page_size= (now {plain.page_size}) or num_shards= (now {budget.shards}) "
            "need less"
        )

    def _layer_pools(self) -> LayerPools:
        pages = self._pages()
        assert pages is not None
        return pages

    def _budget(self, rows: int) -> int:
        """Return the bytes for pages of so many rows: bounded sliding layers have theirs beside them."""
        assert self._layer_budget.total_bytes is not None
        plain = self._layer_pools().plain
        return self._layer_budget.total_bytes - int(
            self._layer_budget.sliding_tokens * rows * plain.page_bytes / plain.page_size
        )

    def _least(self, user: BudgetUser, rows: int) -> int:
        """Return what may be needed while nothing can go: a page that leaves the window may begin one per shard."""
        pages = self._layer_pools()
        size = pages.plain.page_size
        needed = -(-self._layer_budget.least // size) + 2 + min(size, self._layer_budget.shards)
        beside = pages.encoders.most_bytes + user.most_beside(pages.plain, rows)
        # Where layers decide together the page tables of single heads, which are larger, hold packed pages: what was
        # begun with pages of all heads can go on with them.
        page = pages.plain.page_bytes if user.jointly else pages.plain.full_page_bytes
        return rows * needed * page + beside

    def allowed(self, user: BudgetUser) -> int:
        """Return the bytes for the pages of one layer, without what it keeps beside them."""
        return self._budget(self._users[user]) - live_bytes(user.tensors())

    def own(self) -> int:
        """Return the bytes by which what there is stays below the budgets of the layers that have pages here."""
        return sum(map(self.allowed, list(self._users))) - self._layer_pools().nbytes

    def __call__(self) -> int:
        """Return the bytes; less than 0 if what there is exceeds the budget."""
        user = None if self._last is None else self._last()
        if user is None:
            # That fork is gone.
            user = next(iter(self._users), None)
        if user is None or user.shared is None:
            return self.own()
        return _UNLIMITED if user.shared.deciding else self.own() + user.shared.room_beside(user)
