"""One budget for the layers of a cache: they decide together what each keeps, by token, KV head and width."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ..allocation.bit_allocation import BudgetTooSmallError
from ..allocation.known_recall import KnownRecall
from ..allocation.observed_queries import ObservedCall, Observer
from ..allocation.token_widths import LayerTokens, same_shape, token_widths
from ..scheduling.growth_limit import BudgetError
from ..scheduling.page_scheduler import PageScheduler
from .budget_account import BudgetAccount
from .joint_loss import LEAST_RECALLED, judged_layers
from .layer_edits import LayerEdits
from .layer_operation import layer_operation
from .press_eviction import keep_tokens

#: How often a decision is made anew, for less, where its pages turn out larger than expected.
ATTEMPTS = 4


@dataclass(slots=True)
class RunningCall:
    """A call with several tokens that is on its way through the layers.

    Attributes
    ----------
    waits : bool
        Whether its tokens wait for a decision.
    at : int
        The layer that came last, -1 for none.
    observers : dict
        By layer, its queries, and how well its tokens would be recalled.
    """

    waits: bool = False
    at: int = -1
    observers: dict[int, Observer] = field(default_factory=dict)


class JointBudget(BudgetAccount):
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
        super().__init__(members)
        self.deciding = False
        self._call = RunningCall()
        self._refusal: BudgetTooSmallError | None = None

    def forked(self, layer: Any) -> None:
        """Have the fork of a layer decide for itself, until it is told of the others of its cache."""
        join_budgets([layer])

    # A call with several tokens

    def begins(self, member: LayerEdits, new: int, waits_already: bool) -> bool:
        """Return whether `new` tokens that a layer is about to get are to wait for a decision.

        Where a press decides the layers have their tokens wait for it, and are cut down to the budget afterwards.
        """
        call = self._call
        if call.at < 0 or member.layer_idx <= call.at:
            # The one before may have been interrupted.
            call = self._call = RunningCall(not waits_already and bool((self.excess(new) > 0).any()))
        call.at = member.layer_idx
        return call.waits and not waits_already

    def forget_call(self) -> None:
        """Forget the running call: its tokens, or some of them, are gone, or it will not go on."""
        self._call = RunningCall()

    def observe(self, member: LayerEdits, call: ObservedCall) -> None:
        """Note the queries and keys of a layer's newest tokens.

        How well these would be recalled is remembered with the layer: later decisions ask for it.
        """
        scheduler, cache = _scheduler(member), call.cache
        observer, recall = Observer(recalls=call.query.shape[2] >= LEAST_RECALLED), scheduler.recall
        if observer.recalls and call.past and recall is not None and cache is not None:
            observer.resume(recall.mass(call.past), recall.first, cache)
        observer(call)
        if observer.recalled is not None and observer.first is not None:
            scheduler.recall = KnownRecall.of(observer.recalled, observer.first)
        if self._call.waits:
            self._call.observers[member.layer_idx] = observer

    @layer_operation
    def ends(self, member: LayerEdits) -> None:
        """Decide, if tokens wait for it, once the last layer has attended."""
        members, call = self.members, self._call
        if not members or member is not members[-1]:
            return
        self.forget_call()
        if not call.waits:
            return
        pending = [each.store.pending for each in members]
        alike = {
            (tokens.tokens, each.store.state.seen) for tokens, each in zip(pending, members, strict=True) if tokens
        }
        # Something else may have changed layers meanwhile, a press of kvpress say.
        awaited = len(alike) == 1 and all(pending) and all(each.awaits_press for each in members)
        if not awaited or not self._decide(call.observers):
            self._store_by_pages()

    # While tokens are generated

    @layer_operation
    def make_room(self, member: LayerEdits) -> None:
        """Decide anew, if there is no room for as many single tokens as fit into a page.

        Once in a step is enough: only the first of the layers has it done.
        """
        members = self.members
        if not members or member is not members[0]:
            return
        self.forget_call()
        if self.deciding or any(each.awaits_press or each.store.table is None for each in members):
            return
        if bool((self.excess(members[0].store.config.page_size) > 0).any()):
            for each in members:
                each.settle()
                each.take_requested_snapshot()
            if not self._decide({}):
                self._evict_pages()

    # Where no decision can be made

    def _store_by_pages(self) -> None:
        """Store what waits, and evict pages of what exceeds the budget then."""
        try:
            for each in self.members:
                each.end_press()
        except BudgetError as error:
            raise self._explained(error) from error

    def _evict_pages(self) -> None:
        """Evict what exceeds a budget in tokens; one in bytes is kept as pages grow."""
        if self.budgets()[0].total_bytes is not None:
            return
        for row, over in enumerate(self.excess(self.members[0].store.config.page_size)):
            if over > 0:
                self.evict_elsewhere(None, row, int(over))

    def _explained(self, error: BudgetError) -> BudgetError:
        """Return an error that also says what a decision would have needed."""
        return error if self._refusal is None else BudgetError(f"{error}; nor could widths be decided: {self._refusal}")

    # Deciding

    def _decide(self, observers: Mapping[int, Observer]) -> bool:
        """Decide what all layers keep and carry it out; return whether that could be done within the budget.

        `observers` are those of the call whose tokens wait, by layer; where there is none the latest queries count.
        """
        members, self._refusal = self.members, None
        layers = judged_layers(members, observers)
        batch, seen = members[0].store.batch, members[0].store.state.seen
        interval = self.interval(seen)
        budgets = self.row_budgets(interval)
        for _ in range(ATTEMPTS):
            try:
                rows = [self._widths([each.of_row(row) for each in layers], budgets[row]) for row in range(batch)]
            except BudgetTooSmallError as error:
                self._refusal = error
                return False
            kept = [torch.cat(of_layer) for of_layer in zip(*rows, strict=True)]
            missing = self._keep(kept, interval)
            if missing <= 0:
                self._count(layers, kept)
                return True
            # Less by a page at least, or nothing would change.
            less = max(-(-missing // self.distinct()), layers[0].token_bytes * members[0].store.config.page_size)
            budgets = [budget - less for budget in budgets]
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
                    if (recall := _scheduler(member).recall) is not None:
                        _scheduler(member).recall = recall.only(kept > 0)
                if (missing := self.measured(interval)) > 0:
                    raise _TooMuchError(missing)
        except _TooMuchError as error:
            return error.missing
        finally:
            self.deciding = False
        for member in members:
            member.tokens_decided()
        return 0

    def _count(self, layers: Sequence[LayerTokens], kept: Sequence[torch.Tensor]) -> None:
        """Count what has gone."""
        for scheduler, layer, widths in zip(self.schedulers(), layers, kept, strict=True):
            gone = (layer.stored & (widths == 0)).sum()
            scheduler.tokens_evicted += int(gone) // layer.stored.shape[1]


class _TooMuchError(Exception):
    """What was to be kept takes more than the budget."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


def _held_bytes(layer: LayerTokens) -> int:
    return layer.token_bytes * layer.stored.shape[1]


def _scheduler(member: LayerEdits) -> PageScheduler:
    scheduler = member.store.parts[0].scheduler
    assert scheduler is not None
    return scheduler


def join_budgets(layers: Iterable[Any]) -> None:
    """Have the layers of a cache that decide together what they keep know one another.

    Parameters
    ----------
    layers : iterable
        Of a cache. Those that have a budget each, by `budget_scope="layer"`, decide each for itself.
    """
    joint = [layer for layer in layers if getattr(layer, "decides_jointly", False)]
    apart = bool(joint) and joint[0].config.budget_scope == "layer"
    for group in [[layer] for layer in joint] if apart else [joint]:
        budget = JointBudget([layer.edits for layer in group])
        for layer in group:
            layer.edits.joint = budget
            layer.parts[0].scheduler.shared = budget
