"""One budget for the layers of a cache: they decide together what each keeps, by token, KV head and width."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..allocation.observed_queries import Observed, Observer, RunningTurn
from ..allocation.output_projection import gram_of
from ..allocation.token_loss import token_loss
from ..allocation.token_widths import LayerTokens, same_shape, token_widths
from .budget_account import BudgetAccount
from .layer_edits import LayerEdits
from .layer_operation import layer_operation
from .press_eviction import keep_tokens, packed_pages

#: How often a decision is made anew, for less, where its pages turn out larger than expected.
ATTEMPTS = 4


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
        # Of the running call: whether its tokens wait, the layer that came last, and the queries of each.
        self._waits, self._at = False, -1
        self._observers: dict[int, Observer] = {}

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
            self._waits = not waits_already and bool((self.excess(new) > 0).any())
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
        keys: torch.Tensor,
        running: RunningTurn | None,
    ) -> None:
        """Note queries `(B, Hq, Q, D)` and keys of a layer's newest tokens; `valid` `(B, Q)` are no padding."""
        observer = self._observers.setdefault(member.layer_idx, Observer(recalls=True))
        if self._waits:
            observer(query, member.store.state.seen - query.shape[2], valid, scale, sinks, softcap, keys, running)

    @layer_operation
    def ends(self, member: LayerEdits) -> None:
        """Decide, if tokens wait for it, once the last layer has attended."""
        members = self.members
        if not self._waits or not members or member is not members[-1]:
            return
        self._waits = False
        pending = [each.store.pending for each in members]
        alike = {
            (tokens.tokens, each.store.state.seen) for tokens, each in zip(pending, members, strict=True) if tokens
        }
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
        if bool((self.excess(members[0].store.config.page_size) > 0).any()):
            for each in members:
                each.settle()
                each.take_requested_snapshot()
            if not self._decide():
                self._evict_pages()

    def _evict_pages(self) -> None:
        """Evict what exceeds a budget in tokens where no decision could be made."""
        if self.budgets()[0].total_bytes is not None:
            return
        for row, over in enumerate(self.excess(self.members[0].store.config.page_size)):
            if over > 0:
                self.evict_elsewhere(None, row, int(over))

    # Deciding

    def _decide(self) -> bool:
        """Decide what all layers keep and carry it out; return whether that could be done within the budget."""
        members = self.members
        layers = [_tokens_of(each, self._observer_of(each)) for each in members]
        batch, seen = members[0].store.batch, members[0].store.state.seen
        interval = self.interval(seen)
        budgets = self.row_budgets(interval)
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
    loss = token_loss(observer, gram, keys, values, stored)
    return LayerTokens.of(keys, values, stored, loss, packed_pages(store))


def _held_bytes(layer: LayerTokens) -> int:
    return layer.token_bytes * layer.stored.shape[1]


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
