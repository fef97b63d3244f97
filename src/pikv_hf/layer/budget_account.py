"""What the layers of a cache hold of a budget that they share, and what they may hold."""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ..allocation.token_widths import LAYER_BYTES
from ..page_table.page_table import PageTable
from ..scheduling.eviction import evict_bytes, evict_packed, row_bytes
from ..scheduling.growth_limit import GrowthLimit
from ..scheduling.layer_budget import LayerBudget
from ..scheduling.page_scheduler import PageScheduler
from ..scheduling.shared_budget import BudgetUser
from .layer_edits import LayerEdits
from .table_rebuild import leaders_of

#: Between two decisions while tokens are generated come so many tokens at most: a share of the budget, within limits.
INTERVAL_SHARE, MAX_INTERVAL = 32, 64


class BudgetAccount:
    """Adds up what the layers of a cache hold, in the bytes of keys and values, or in all that their pools take.

    A budget in tokens, or a share of those seen, is one of the former, for each sequence: a token that is packed counts
    as what it takes. A budget in bytes is one of the latter, for all sequences together.

    Parameters
    ----------
    members : sequence of LayerEdits
        Of the layers, in the model's order. They are not kept alive.
    """

    def __init__(self, members: Sequence[LayerEdits]) -> None:
        self._members = [weakref.ref(member) for member in members]

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""
        return self.members[0].lock

    @property
    def members(self) -> list[LayerEdits]:
        """The layers that are still there."""
        return [member for reference in self._members if (member := reference()) is not None]

    def schedulers(self) -> list[PageScheduler]:
        found = [each.store.parts[0].scheduler for each in self.members]
        assert all(found)
        return [scheduler for scheduler in found if scheduler is not None]

    def budgets(self) -> list[LayerBudget]:
        return [scheduler.budget for scheduler in self.schedulers() if scheduler.budget is not None]

    def excess(self, new: int) -> np.ndarray:
        """Return the bytes that each sequence, or all together, would hold too many with `new` more tokens, `(n,)`."""
        if self.budgets()[0].total_bytes is not None:
            return np.array([self._bytes_missing(new)])
        total = np.zeros(1)
        for member, budget in zip(self.members, self.budgets(), strict=True):
            total = total + self._excess_of(member, budget, member.store.table, new)
        return total

    def _excess_of(self, member: LayerEdits, budget: LayerBudget, table: PageTable | None, new: int) -> np.ndarray:
        """Return the bytes that each sequence holds in a layer beyond an equal share of the budget, `(B,)`."""
        store = member.store
        if table is None:
            # Of the first tokens of a cache the bytes are not known yet; that they are too many is.
            return np.array([new - (budget.tokens_of(new, 1) or 0)])
        padding = np.array(store.padding() or [0])
        waiting = 0 if store.pending is None else store.pending.tokens
        allowed = np.array([budget.tokens_of(store.state.seen + new - columns, 1) for columns in padding])
        per_token = _token_bytes(member)
        return row_bytes(table, _lanes(member, table)) + (waiting + new - allowed) * per_token

    def over(self, user: BudgetUser, table: PageTable, row: int) -> int:
        """Return the bytes that a sequence holds too many, where a user's layer is to hold this table."""
        total = 0.0
        for member, scheduler, budget in zip(self.members, self.schedulers(), self.budgets(), strict=True):
            if scheduler is user:
                total += self._excess_of(member, budget, table, 0)[row] - _waiting_bytes(member)
            elif member.store.table is not None:
                total += self._excess_of(member, budget, member.store.table, 0)[row] - _waiting_bytes(member)
        return int(np.ceil(total))

    def room_beside(self, user: BudgetUser) -> int:
        """Return by how many bytes the pools of all layers but a user's own are below their parts of a budget."""
        limits = (_growth_limit(each) for each in self.members if each.store.parts[0].scheduler is not user)
        return sum(limit.own() for limit in limits if limit is not None)

    def _bytes_missing(self, new: int) -> int:
        """Return the bytes that are missing for the pages of `new` more tokens of each sequence."""
        needed = room = absent = 0
        for member, budget in zip(self.members, self.budgets(), strict=True):
            table, limit = member.store.table, _growth_limit(member)
            if table is None or limit is None:
                assert budget.total_bytes is not None
                absent, room = absent + 1, room + budget.total_bytes
                continue
            waiting = 0 if member.store.pending is None else member.store.pending.tokens
            of_member = self._growth(member, table, new + waiting)
            needed, room = needed + of_member, room + limit.own()
        # What has no pages yet will be as large as the first one, which is the only one that has any.
        first = self.members[0].store.table
        return needed + (0 if first is None else absent * self._growth(self.members[0], first, new)) - room

    def _growth(self, member: LayerEdits, table: PageTable, new: int) -> int:
        """Return the most bytes by which the pools of a layer grow for so many more tokens of each sequence."""
        size, plain = table.plain.page_size, table.plain
        # A prompt begins a page in each shard, and one in the window.
        begun = 1 if new <= size else 2 + table.num_shards
        pages = len(table.sequences()) * (-(-new // size) - 1 + begun)
        return max(0, pages - plain.allocator.free_pages) * plain.full_page_bytes

    def evict_elsewhere(self, user: BudgetUser | None, row: int, nbytes: int) -> int:
        """Evict pages of a sequence, or of all if it is below 0, in other layers; return how many bytes are missing."""
        left = nbytes
        for member, scheduler in zip(self.members, self.schedulers(), strict=True):
            table = member.store.table
            if scheduler is user or table is None or left <= 0:
                continue
            seen = member.store.state.seen
            if row >= 0:
                lanes = _lanes(member, table)
                left = evict_packed(scheduler, table, table.rows[row * lanes : (row + 1) * lanes], left, seen)
            else:
                # Whoever needs room asks again, if it is not enough.
                left = 0 if evict_bytes(scheduler, table, list(table.pools.by_id()), left, seen) else left
            member.store.note_evictions()
        return left

    def interval(self, seen: int) -> int:
        """Return for how many tokens to leave room."""
        store, budget = self.members[0].store, self.budgets()[0]
        size = store.config.page_size
        tokens = budget.tokens_of(seen, 1)
        if tokens is None:
            assert budget.total_bytes is not None
            tokens = int(budget.total_bytes / max(1.0, _token_bytes(self.members[0]) * store.batch))
        return max(size, min(tokens // INTERVAL_SHARE, MAX_INTERVAL) // size * size)

    def row_budgets(self, interval: int) -> list[int]:
        """Return the bytes that each sequence may keep now."""
        members, budgets = self.members, self.budgets()
        if budgets[0].total_bytes is None:
            allowed = np.zeros(members[0].store.batch)
            for member, budget in zip(members, budgets, strict=True):
                seen = member.store.state.seen
                tokens = [budget.tokens_of(seen + interval - columns, 1) for columns in member.store.padding()]
                allowed += (np.array(tokens) - interval) * _token_bytes(member)
            return [int(each) for each in allowed]
        total = 0
        for member in members:
            limit, scheduler = _growth_limit(member), member.store.parts[0].scheduler
            assert limit is not None
            assert scheduler is not None
            total += limit.allowed(scheduler) - LAYER_BYTES - self.reserve(member, interval)
        return [max(0, total // self.distinct())] * members[0].store.batch

    def reserve(self, member: LayerEdits, interval: int) -> int:
        """Return the bytes of the pages that `interval` single tokens of each sequence may need in a layer."""
        table = member.store.table
        assert table is not None
        rows, lanes = member.store.batch, _lanes(member, table)
        pages = -(-interval // table.plain.page_size) + 1
        return rows * pages * lanes * table.plain.full_page_bytes

    def distinct(self) -> int:
        """Return how many sequences are not like another one, with which they would share all pages."""
        store = self.members[0].store
        assert store.table is not None
        nothing = torch.zeros((store.batch, store.heads, store.state.seen), dtype=torch.uint8, device=store.device)
        return len(set(leaders_of(store.table, store.pending, nothing)))

    def measured(self, interval: int) -> int:
        """Return the bytes that are missing, for all layers, with room for `interval` more tokens."""
        if self.budgets()[0].total_bytes is None:
            return int(np.ceil(self.excess(interval).max()))
        return sum(self.reserve(each, interval) for each in self.members) - sum(
            limit.own() for each in self.members if (limit := _growth_limit(each)) is not None
        )


def _token_bytes(member: LayerEdits) -> float:
    """Return the bytes of a token of a sequence in a layer, as the model makes it."""
    table = member.store.table
    assert table is not None
    return table.plain.page_bytes / table.plain.page_size * _lanes(member, table)


def _waiting_bytes(member: LayerEdits) -> float:
    """Return the bytes of the tokens of a sequence that wait: they are not stored yet."""
    pending = member.store.pending
    return 0.0 if pending is None else pending.tokens * _token_bytes(member)


def _lanes(member: LayerEdits, table: PageTable) -> int:
    return int(member.store.heads // table.plain.keys.shape[0])


def _growth_limit(member: LayerEdits) -> GrowthLimit | None:
    table = member.store.table
    limit = None if table is None else table.pools.plain.growth_limit
    return limit if isinstance(limit, GrowthLimit) else None
