"""What happens to a layer's tokens once the model has handed them over: settled, kept or evicted, assigned, cropped."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..common.kv import KV
from ..distributed.process_exchange import leave_group_on_error
from ..page_table.cropping import Crop
from . import press_eviction
from .decoded_tokens import is_mid_page, record_experts
from .joint_decision import JointDecision
from .kv_assignment import KVAssignment, assign_tokens, begins_with, check_assignable, check_assigned
from .latent_tokens import LatentTokens
from .layer_cropping import Snapshot, reserved_crops, shorten_state
from .layer_operation import layer_operation
from .layer_store import LayerStore
from .model_link import ModelLink


class LayerEdits:
    """Changes the tokens of a layer for all but the model: its expert router, presses, kvpress's pipeline, crops.

    It is what the hooks of the model report to. Whoever changes tokens settles first what is pending, so that changes
    come one after the other; what was true only of the tokens as they were is forgotten with each.

    Parameters
    ----------
    store : LayerStore
        The tokens, stored and pending.
    link : ModelLink, optional
        The attached model.

    Attributes
    ----------
    latents : LatentTokens
        The tokens as the model has them, where the layer stores latents.
    assignment : KVAssignment
        Of keys and values from outside.
    snapshot : Snapshot or None
        Of the tables as they were at an earlier length, while nothing but new tokens has come after it.
    awaits_press : bool
        Whether a press will decide at the end of the call what is kept; until then nothing is packed.
    joint : JointDecision or None
        What decides for all layers of the cache what they keep within a budget.
    is_read : bool
        Whether the model's attention module is known to have read this layer last, of all caches.
    snapshot_due : bool
        Whether the next tokens come after a snapshot; see :meth:`request_snapshot`.
    """

    def __init__(self, store: LayerStore, link: ModelLink | None) -> None:
        self.store, self.link = store, link
        self.latents = LatentTokens(store, link)
        self.layer_idx, self.exchange = store.layer_idx, store.layout.exchange
        self.is_read = False
        self.joint: JointDecision | None = None
        self.reset()

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""
        return self.store.lock

    def reset(self) -> None:
        """Forget assignments, snapshots and presses."""
        self.assignment = KVAssignment()
        self.snapshot: Snapshot | None = None
        # The one that the layer has just gone back to.
        self._restored: Snapshot | None = None
        self.awaits_press = self.snapshot_due = False
        self._forget_call()

    def _forget_call(self) -> None:
        if self.joint is not None:
            self.joint.forget_call()

    def _tokens_changed(self) -> None:
        """Forget what was true only of the tokens as they were: snapshots, dense copies, experts that are expected."""
        self.snapshot = None
        self.assignment.forget()
        if self.link is not None:
            self.link.forget(self)

    # Settling what is pending

    @layer_operation
    @leave_group_on_error
    def settle(self) -> None:
        """Store what is pending, where no router is awaited, and move what has left the window to its shards."""
        self.settle_within()

    def settle_within(self) -> bool:
        """Do as :meth:`settle` within another operation; return whether a token is within a page: nothing was done."""
        if self.assignment.staged is not None:
            self.complete_assignment()
        self.settle_marks()
        try:
            if is_mid_page(self.store):
                return True
            self.store.settle()
            return False
        finally:
            self.awaits_press &= self.store.pending is not None

    def settle_unless_awaited(self) -> None:
        """Store what is pending, unless a router, a press or an assignment has yet to say what."""
        pending = self.store.pending
        awaits_router = pending is not None and pending.experts is None and self.store.num_experts > 0
        awaited = self.awaits_press or awaits_router or self.store.awaits_indexer
        if self.assignment.staged is None and not awaited:
            self.settle()

    def settle_soon(self) -> None:
        """Store what is pending before the next layer's: until then a press may take the tokens as they came."""
        if self.store.awaits_indexer:
            return
        if self.store.pending is None or self.link is None:
            self.settle()
        else:
            self.link.linger(self)

    @property
    def awaited(self) -> tuple[int, int]:
        """How many rows the layer has, and how many tokens of each are its newest."""
        pending = self.store.pending
        return self.store.batch, 1 if pending is None else pending.tokens

    @layer_operation
    @leave_group_on_error
    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers, and place what was waiting for them."""
        store, (batch, new) = self.store, self.awaited
        if experts.numel() != batch * new:
            raise RuntimeError(
                f"layer {self.layer_idx}: the router chose experts for {experts.numel()} tokens, "
                f"the cache got {batch * new}"
            )
        if store.pending is None:
            record_experts(store, experts)
            return
        waiting, store.pending = store.pending, dataclasses.replace(store.pending, experts=experts.view(batch, -1))
        try:
            self.settle_marks()
            self._place_unless_pressed()
        except BaseException:
            if store.pending is not None:
                store.pending = waiting
            raise

    def _place_unless_pressed(self) -> None:
        pending = self.store.pending
        if pending is not None and pending.experts is not None and not self.awaits_press:
            self.store.place(pending.experts)

    # Presses

    def begin_press(self) -> None:
        """Wait with the next call's tokens for :meth:`keep`, at the latest until the call after it."""
        self.settle()
        self.awaits_press = True

    @layer_operation
    def end_press(self) -> None:
        """End :meth:`begin_press`: the tokens are stored as they would have been."""
        awaited, self.awaits_press = self.awaits_press, False
        try:
            self._place_unless_pressed()
        except BaseException:
            self.awaits_press = awaited and self.store.pending is not None
            raise

    @layer_operation
    @leave_group_on_error
    def keep(self, kept: torch.Tensor) -> None:
        """Evict tokens and keep the others in the widths given; see :meth:`PiKVLayer.keep`."""
        press_eviction.check_evicts(self.store, self.link is not None)
        if (expansion := self.latents.expansion()) is not None:
            press_eviction.check_kept(self.store, expansion.expanded[0], kept)
            self.latents.expand()
        press_eviction.keep_tokens(self.store, kept)
        self._tokens_changed()
        self.awaits_press = False

    def tokens_decided(self) -> None:
        """Follow a decision by which the layer keeps other tokens now."""
        self._tokens_changed()
        self.awaits_press = False
        self.give_back()

    def settle_marks(self) -> None:
        """Evict the tokens that kvpress's head-wise presses have marked on the attention module."""
        marks = None if self.link is None else self.link.take_marks(self)
        if marks is not None and self.store.table is not None:
            self.latents.expand()
            self.keep(press_eviction.kept_by_marks(self.store, marks))

    # K/V assigned from outside

    @layer_operation
    def hand_out(self, which: KV) -> torch.Tensor | None:
        """Return the dense keys or values by column, None before the first tokens."""
        if self.store.table is None:
            return None
        self.settle_marks()
        return self.assignment.hand_out(which, self.latents.dense(which))

    def stage_keys(self, keys: torch.Tensor) -> None:
        """Take the keys of an assignment, which values complete."""
        check_assignable(self.store)
        self.assignment.staged = keys

    def assign_values(self, values: object) -> None:
        """Complete an assignment of keys and values; the first tokens of what was handed out are a crop."""
        staged = self.assignment.take_staged()
        keys = self.hand_out(KV.KEYS) if staged is None else staged
        self._assign(*self._checked(keys, values))

    def _checked(self, keys: object, values: object) -> tuple[torch.Tensor, torch.Tensor]:
        return check_assigned(self.store, self.latents.kv_format(), self.link, keys, values)

    @layer_operation
    def complete_assignment(self) -> None:
        """Have keys that were assigned alone count, with the values that there are.

        Raises
        ------
        RuntimeError
            If these are of another shape; the keys go on to wait for values of theirs.
        """
        if (keys := self.assignment.staged) is None:
            return
        values = self.hand_out(KV.VALUES)
        if values is None or getattr(keys, "shape", ())[:3] != values.shape[:3]:
            shapes = tuple(getattr(keys, "shape", ())), None if values is None else tuple(values.shape)
            raise RuntimeError(
                f"layer {self.layer_idx}: keys {shapes[0]} were assigned without values, and do not fit those that "
                f"there are, {shapes[1]}; assign both"
            )
        self.assignment.staged = None
        try:
            self._assign(*self._checked(keys, values))
        except BaseException:
            self.assignment.staged = keys
            raise

    @layer_operation
    def _assign(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.assignment.is_crop(keys, values) and begins_with(self.latents.dense_pair(), keys, values):
            self.truncate(values.shape[2])
        else:
            self.latents.expand()
            assign_tokens(self.store, keys, values, may_be_picked=self.link is not None)
            self._tokens_changed()

    # Length and rows

    def request_snapshot(self) -> None:
        """Have the next update snapshot the tables, so that a crop to the present length is exact whatever it packs.

        kvpress's pipeline asks each layer's length before a question and cuts the answer off afterwards.
        """
        self.snapshot_due = True

    def take_requested_snapshot(self) -> None:
        """Snapshot the tables if that was asked for."""
        if self.snapshot_due:
            self.snapshot, self.snapshot_due = Snapshot.take(self.store), False

    @layer_operation
    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        with self.truncating(length):
            pass
        self.give_back()

    def make_ready(self, length: int) -> None:
        """Store what a crop to `length` columns needs stored, and make room for it.

        :meth:`truncating` does so too. Where other layers share a budget, all have to be ready before the first begins:
        within a transaction nothing can be evicted.
        """
        store, pending = self.store, self.store.pending
        is_exact = self.snapshot is not None and self.snapshot.length == length
        if length >= store.state.seen or store.table is None or is_exact:
            return
        awaited, dropped = self.awaits_press, length <= store.stored
        if dropped:
            store.pending = None
        try:
            self._settled_crops(length)
        finally:
            if dropped:
                # Until the crop is done it may yet be needed.
                store.pending, self.awaits_press = pending, awaited

    @property
    def pages_evicted(self) -> int:
        """Pages that have gone for a budget."""
        return sum(part.scheduler.pages_evicted for part in self.store.parts if part.scheduler is not None)

    @contextmanager
    def truncating(self, length: int) -> Iterator[None]:
        """Keep the first `length` columns, unless the block raises; :meth:`give_back` comes after it."""
        store = self.store
        self._forget_call()
        if length >= store.state.seen or store.table is None:
            yield
            return
        is_exact = self.snapshot is not None and self.snapshot.length == length
        with self._leaving(), self._without_pending(length <= store.stored):
            crops = [] if is_exact else self._settled_crops(length)
            with store.transaction():
                if is_exact and self.snapshot is not None:
                    store.pending = None
                    store.replace_tables(self.snapshot.tables)
                for cut in crops:
                    cut.cut()
                shorten_state(store, length)
                store.state.reference_lost |= store.state.reference_out and not store.state.history_out
                store.state.reference_out = False
                yield
        self._restored = self.snapshot if is_exact else None
        self._tokens_changed()

    @contextmanager
    def _without_pending(self, dropped: bool) -> Iterator[None]:
        """Drop the pending tokens, if these are to be, unless the block raises."""
        pending = self.store.pending
        if not dropped or pending is None:
            yield
            return
        self.store.pending = None
        try:
            yield
        except BaseException:
            self.store.pending = pending
            raise

    def _settled_crops(self, length: int) -> list[Crop]:
        self.settle()
        return reserved_crops(self.store, length)

    @layer_operation
    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`. No token is copied."""
        with self.selecting(indices):
            pass
        self.give_back()

    @contextmanager
    def selecting(self, indices: Sequence[int]) -> Iterator[None]:
        """Replace the rows of the batch, unless the block raises; :meth:`give_back` comes after it."""
        self._forget_call()
        if self.store.table is None:
            yield
            return
        with self._leaving():
            self.settle_marks()
            with self.store.transaction():
                self.store.select(indices)
                yield
        self.snapshot = None
        self.assignment.forget()

    @layer_operation
    def give_back(self) -> None:
        """Give back the memory of what a change of length or rows has left out."""
        restored, self._restored = self._restored, None
        if restored is not None:
            restored.forget_later_pools()
        self.store.give_back()

    def _leaving(self) -> AbstractContextManager[None]:
        """Leave the other processes if the block raises."""
        return nullcontext() if self.exchange is None else self.exchange.leaving()
