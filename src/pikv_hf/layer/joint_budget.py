"""One budget for the layers of a cache: they decide together what each keeps, by token, KV head and width."""

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch

from ..allocation.observed_queries import Observed, Observer
from ..allocation.output_projection import gram_of
from ..allocation.token_loss import token_loss
from ..allocation.token_widths import LAYER_BYTES, LayerTokens, same_shape, token_widths
from ..page_table.page_table import PageTable
from ..scheduling.eviction import evict_bytes, evict_packed, row_bytes
from ..scheduling.growth_limit import GrowthLimit
from ..scheduling.layer_budget import LayerBudget
from ..scheduling.page_scheduler import PageScheduler
from ..scheduling.shared_budget import BudgetUser
from .layer_edits import LayerEdits
from .layer_operation import layer_operation
from .press_eviction import keep_tokens, packed_pages
from .table_rebuild import leaders_of

#: Between two decisions while tokens are generated come so many tokens at most: a share of the budget, within limits.
INTERVAL_SHARE, MAX_INTERVAL = 32, 64

#: How often a decision is made anew, for less, where its pages turn out larger than expected.
ATTEMPTS = 4


class JointBudget:
    """Decides for all layers of a cache what they keep, as :class:`~pikv_hf.presses.PiKVPress` does.

    The tokens of a call with several of them wait, if they would exceed the budget, until the last layer has attended.
    Then every token of every KV head of every layer gets a width, or none, by what losing it costs and by the bytes
    that it takes. While single tokens come, the same is decided anew whenever the room that was left for them is used
    up.

    Parameters
    ----------
    members : sequence of LayerEdits
        Of the layers, in the model's order. They are not kept alive.

    Attributes
    ----------
    deciding : bool
        Whether a decision is being carried out.
    """

    def __init__(self, members: Sequence[LayerEdits]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self.deciding = False
        # Of the running call: whether its tokens wait, the layer that came last, and the queries of each.
        self._waits, self._at = False, -1
        self._observers: dict[int, Observer] = {}

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""
        return self.members[0].lock

    @property
    def members(self) -> list[LayerEdits]:
        """The layers that are still there."""
        return [member for reference in self._members if (member := reference()) is not None]

    def forked(self, layer: Any) -> None:
        """Have the fork of a layer decide for itself, until it is told of the others of its cache."""
        join_budgets([layer])

    # A call with several tokens

    def begins(self, member: LayerEdits, new: int, waits_already: bool) -> bool:
        """Return whether `new` tokens that a layer is about to get are to wait for a decision.

        Where a press decides the layers have their tokens wait for it, and are cut down to the budget afterwards.
        """
        if member.layer_idx <= self._at or not self._observers:
            self._observers = {}
            self._waits = not waits_already and bool((self._excess(new) > 0).any())
        self._at = member.layer_idx
        return self._waits and not waits_already

    def observe(
        self,
        member: LayerEdits,
        query: torch.Tensor,
        valid: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None,
        softcap: float | None,
    ) -> None:
        """Note the queries `(B, Hq, Q, D)` of a layer's newest tokens, of which `valid` `(B, Q)` are no padding."""
        observer = self._observers.setdefault(member.layer_idx, Observer())
        if self._waits:
            observer(query, member.store.state.seen - query.shape[2], valid, scale, sinks, softcap)

    @layer_operation
    def ends(self, member: LayerEdits) -> None:
        """Decide, if tokens wait for it, once the last layer has attended."""
        members = self.members
        if not self._waits or not members or member is not members[-1]:
            return
        self._waits = False
        pending = [each.store.pending for each in members]
        alike = {(tokens.tokens, each.store.state.seen) for tokens, each in zip(pending, members, strict=True) if tokens}
        # Something else may have changed layers meanwhile, a press of kvpress say.
        if len(alike) > 1 or not all(pending) or not all(each.awaits_press for each in members) or not self._decide():
            for each in members:
                each.end_press()
        self._observers = {}

    # While tokens are generated

    @layer_operation
    def make_room(self) -> None:
        """Decide anew, if there is no room for as many single tokens as fit into a page."""
        members = self.members
        if self.deciding or any(each.awaits_press or each.store.table is None for each in members):
            return
        if bool((self._excess(members[0].store.config.page_size) > 0).any()):
            for each in members:
                each.settle()
                each.take_requested_snapshot()
            if not self._decide():
                self._evict_pages()

    def _evict_pages(self) -> None:
        """Evict what exceeds a budget in tokens where no decision could be made."""
        if self._budgets()[0].total_bytes is not None:
            return
        for row, over in enumerate(self._excess(self.members[0].store.config.page_size)):
            if over > 0:
                self.evict_elsewhere(None, row, int(over))

    # What is held, and what may be

    def _schedulers(self) -> list[PageScheduler]:
        found = [each.store.parts[0].scheduler for each in self.members]
        assert all(found)
        return [scheduler for scheduler in found if scheduler is not None]

    def _budgets(self) -> list[LayerBudget]:
        return [scheduler.budget for scheduler in self._schedulers() if scheduler.budget is not None]

    def _excess(self, new: int) -> np.ndarray:
        """Return the bytes that each sequence, or all together, would hold too many with `new` more tokens, `(n,)`."""
        if self._budgets()[0].total_bytes is not None:
            return np.array([self._bytes_missing(new)])
        total = np.zeros(1)
        for member, budget in zip(self.members, self._budgets(), strict=True):
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
        for member, scheduler, budget in zip(self.members, self._schedulers(), self._budgets(), strict=True):
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
        for member, budget in zip(self.members, self._budgets(), strict=True):
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
        for member, scheduler in zip(self.members, self._schedulers(), strict=True):
            table = member.store.table
            if scheduler is user or table is None or left <= 0:
                continue
            seen = member.store.state.seen
            if row >= 0:
                lanes = _lanes(member, table)
                left = evict_packed(scheduler, table, table.rows[row * lanes : (row + 1) * lanes], left, seen)
            else:
                before = table.pools.nbytes
                evict_bytes(scheduler, table, list(table.pools.by_id()), left, seen)
                left -= before - table.pools.nbytes
            member.store.note_evictions()
        return left

    # Deciding

    def _decide(self) -> bool:
        """Decide what all layers keep and carry it out; return whether that could be done within the budget."""
        members = self.members
        layers = [_tokens_of(each, self._observer_of(each)) for each in members]
        batch, seen = members[0].store.batch, members[0].store.state.seen
        interval = self._interval(seen)
        budgets = self._row_budgets(layers, interval)
        for _ in range(ATTEMPTS):
            try:
                rows = [self._widths([each.of_row(row) for each in layers], budgets[row]) for row in range(batch)]
            except ValueError:
                return False
            kept = [torch.cat(of_layer) for of_layer in zip(*rows, strict=True)]
            missing = self._keep(kept, interval)
            if missing <= 0:
                self._count(layers, kept)
                return True
            budgets = [budget - -(-missing // self._distinct()) for budget in budgets]
        return False

    def _widths(self, layers: list[LayerTokens], budget: int) -> list[torch.Tensor]:
        """Return `(1, H, T)` uint8 widths of each layer, of one sequence."""
        config = self.members[0].store.config
        whole = sum(_held_bytes(each) for each in layers)
        widths: dict[int, torch.Tensor] = {}
        for group in same_shape(layers):
            part = sum(_held_bytes(layers[index]) for index in group) / whole
            given = token_widths(
                [layers[index] for index in group],
                int(budget * part),
                config.page_size,
                sinks=config.sink_tokens,
                recent=config.recent_window,
            )
            widths.update(zip(group, given, strict=True))
        return [widths[index] for index in range(len(layers))]

    def _interval(self, seen: int) -> int:
        """Return for how many tokens to leave room."""
        store, budget = self.members[0].store, self._budgets()[0]
        size = store.config.page_size
        tokens = budget.tokens_of(seen, 1)
        if tokens is None:
            assert budget.total_bytes is not None
            tokens = int(budget.total_bytes / max(1.0, _token_bytes(self.members[0]) * store.batch))
        return max(size, min(tokens // INTERVAL_SHARE, MAX_INTERVAL) // size * size)

    def _row_budgets(self, layers: Sequence[LayerTokens], interval: int) -> list[int]:
        """Return the bytes that each sequence may keep now."""
        members, budgets = self.members, self._budgets()
        if budgets[0].total_bytes is None:
            allowed = np.zeros(members[0].store.batch)
            for member, budget in zip(members, budgets, strict=True):
                seen = member.store.state.seen
                tokens = [budget.tokens_of(seen + interval - columns, 1) for columns in member.store.padding()]
                allowed += (np.array(tokens) - interval) * _token_bytes(member)
            return [int(each) for each in allowed]
        total = 0
        for member, layer in zip(members, layers, strict=True):
            limit, scheduler = _growth_limit(member), member.store.parts[0].scheduler
            assert limit is not None
            assert scheduler is not None
            total += limit.allowed(scheduler) - LAYER_BYTES - self._reserve(member, interval)
        return [max(0, total // self._distinct())] * members[0].store.batch

    def _reserve(self, member: LayerEdits, interval: int) -> int:
        """Return the bytes of the pages that `interval` single tokens of each sequence may need in a layer."""
        table = member.store.table
        assert table is not None
        rows, lanes = member.store.batch, _lanes(member, table)
        pages = -(-interval // table.plain.page_size) + 1
        return rows * pages * lanes * table.plain.full_page_bytes

    def _distinct(self) -> int:
        """Return how many sequences are not like another one, with which they would share all pages."""
        store = self.members[0].store
        assert store.table is not None
        nothing = torch.zeros((store.batch, store.heads, store.state.seen), dtype=torch.uint8, device=store.device)
        return len(set(leaders_of(store.table, store.pending, nothing)))

    def _keep(self, widths: Sequence[torch.Tensor], interval: int) -> int:
        """Have all layers keep `(B, H, T)` widths, or none; return the bytes that are missing if that is too much."""
        members = self.members
        try:
            with ExitStack() as stack:
                for member in members:
                    stack.enter_context(member.store.transaction())
                self.deciding = True
                for member, kept in zip(members, widths, strict=True):
                    keep_tokens(member.store, kept)
                if (missing := self._measured(interval)) > 0:
                    raise _TooMuchError(missing)
        except _TooMuchError as error:
            return error.missing
        finally:
            self.deciding = False
        for member in members:
            member.tokens_decided()
        return 0

    def _measured(self, interval: int) -> int:
        """Return the bytes that are missing, for all layers, with room for `interval` more tokens."""
        if self._budgets()[0].total_bytes is None:
            return int(np.ceil(self._excess(interval).max()))
        return sum(self._reserve(each, interval) for each in self.members) - sum(
            limit.own() for each in self.members if (limit := _growth_limit(each)) is not None
        )

    def _count(self, layers: Sequence[LayerTokens], kept: Sequence[torch.Tensor]) -> None:
        """Count what has gone."""
        for scheduler, layer, widths in zip(self._schedulers(), layers, kept, strict=True):
            gone = (layer.stored & (widths == 0)).sum()
            scheduler.tokens_evicted += int(gone) // layer.stored.shape[1]

    def _observer_of(self, member: LayerEdits) -> Observer:
        """Return the queries by which a layer's tokens are judged: those of the call, or the latest ones."""
        known = self._observers.get(member.layer_idx)
        if known is not None and known.recent is not None:
            return known
        scheduler, observer = member.store.parts[0].scheduler, Observer()
        assert scheduler is not None
        assert scheduler.queries is not None
        # Scaled already; all of what is stored came before them, or nearly so.
        queries = scheduler.queries
        observer.recent = Observed(queries, torch.arange(queries.shape[2], device=queries.device), None)
        observer.seen = -1
        return observer


class _TooMuchError(Exception):
    """What was to be kept takes more than the budget."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


def _tokens_of(member: LayerEdits, observer: Observer) -> LayerTokens:
    """Return what is known of the tokens of a layer."""
    store, link = member.store, member.link
    assert link is not None
    assert observer.recent is not None
    keys, values = member.latents.dense_pair()
    stored = member.latents.stored_mask()
    module = link.attention_of(store.layer_idx)
    assert module is not None
    gram = gram_of(module, observer.recent.queries.shape[1], values.shape[-1])
    return LayerTokens(keys, values, stored, token_loss(observer, gram, keys, values, stored), packed_pages(store))


def _held_bytes(layer: LayerTokens) -> int:
    return layer.token_bytes * layer.keys.shape[1]


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


def join_budgets(layers: Iterable[Any]) -> None:
    """Have the layers of a cache that decide together what they keep know one another.

    Parameters
    ----------
    layers : iterable
        Of a cache. Those that have a budget each, by `budget_scope="layer"`, decide each for itself.
    """
    joint = [layer for layer in layers if decides_jointly(layer)]
    apart = bool(joint) and joint[0].config.budget_scope == "layer"
    for group in [[layer] for layer in joint] if apart else [joint]:
        budget = JointBudget([layer.edits for layer in group])
        for layer in group:
            layer.edits.joint = budget
            layer.parts[0].scheduler.shared = budget


def decides_jointly(layer: Any) -> bool:
    """Return whether a layer of a cache is one that decides together with others what it keeps."""
    return bool(getattr(layer, "decides_jointly", False))
