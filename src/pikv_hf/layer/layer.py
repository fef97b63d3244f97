"""One layer of the cache, as transformers, attention functions, routers and presses speak to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..common.foreign_attributes import LAYER_ATTRIBUTE
from ..config import PiKVConfig
from ..distributed.device_layout import PartLayout
from ..distributed.lockstep import prompt_mark
from ..distributed.process_exchange import leave_group_on_error
from ..page_table.page_table import PageTable
from . import layer_reads, press_eviction
from .input_checks import KVFormat, check_fits
from .kv_assignment import KVAssignment, assign_tokens, check_assigned
from .layer_cropping import Snapshot, column_of, crop_tables, cropped_length, shorten_state
from .layer_part import LayerPart, make_parts
from .layer_state import LayerState
from .layer_store import LayerStore
from .model_link import ModelLink
from .pending_tokens import PendingTokens


class PiKVLayer(CacheLayerMixin):
    """The paged K/V of one attention layer.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Page size, window, shards.
    attachment : ModelLink, optional
        The attached model. Without one, `update` returns dense K/V for any attention implementation.
    layout : PartLayout, optional
        Where its parts are; by default one, on the layer's own device.
    parts : list of LayerPart, optional
        Those of this process, from :func:`~pikv_hf.layer.layer_part.make_parts`; by default without a budget.
    leads : bool
        Whether it is the cache's first, in which processes make sure that they have the same tokens.

    Attributes
    ----------
    store : LayerStore
        The tokens, stored and pending.
    assignment : KVAssignment
        Of keys and values from outside.
    snapshot : Snapshot or None
        To crop back to exactly, while the tokens are those of before and others after them.
    awaits_press : bool
        Whether a press will decide at the end of the call what is kept; until then nothing is packed.
    prompt_mark : torch.Tensor or None
        Of a prompt that the processes have not agreed on yet.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        layer_idx: int,
        config: PiKVConfig,
        attachment: ModelLink | None = None,
        layout: PartLayout | None = None,
        parts: list[LayerPart] | None = None,
        leads: bool = False,
    ) -> None:
        self.layer_idx, self.attachment, self.leads = layer_idx, attachment, leads
        self.layout = PartLayout() if layout is None else layout
        self.exchange = self.layout.exchange
        self.parts = make_parts(layer_idx, config, self.layout) if parts is None else parts
        routers = {} if attachment is None or config.placement == "hash" else attachment.expert_routers
        self.has_expert_router = layer_idx in routers
        experts = routers[layer_idx].num_experts if self.has_expert_router else 0
        self.store = LayerStore(layer_idx, config, self.layout, self.parts, experts)
        self._forget_call()

    def _forget_call(self) -> None:
        self.assignment = KVAssignment()
        self.snapshot: Snapshot | None = None
        self._snapshot_due = self.awaits_press = False
        self.prompt_mark: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pools and page tables for K/V of these shapes."""
        self.store.begin(KVFormat.of(key_states, value_states))

    def reset(self) -> None:
        """Forget everything and return the memory."""
        self.store.clear()
        self._forget_call()

    # What it has

    @property
    def config(self) -> PiKVConfig:
        """Options of the layer."""
        return self.store.config

    @property
    def state(self) -> LayerState:
        """What is known of the tokens, as a fork copies it and a file holds it."""
        return self.store.state

    @property
    def seen(self) -> int:
        """Columns, pending and evicted ones and padding included."""
        return self.store.state.seen

    @property
    def is_initialized(self) -> bool:
        """Whether pools and page tables exist."""
        return self.store.state.is_initialized

    @property
    def pending(self) -> PendingTokens | None:
        """New tokens that wait for the expert router, or for a press."""
        return self.store.pending

    @property
    def table(self) -> PageTable | None:
        """What the first part stores: everything but shards on other devices."""
        return self.parts[0].table

    def tables(self) -> list[PageTable]:
        """Return what the parts of this process store."""
        return self.store.tables()

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first update."""
        return self.store.batch

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.store.heads

    @property
    def lanes(self) -> int:
        """Rows of the table per sequence: 1, or one per KV head once heads keep different tokens."""
        return self.store.lanes

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all K/V by column, `(B, H, T, D)` and `(B, H, T, Dv)`; zeros for padding and what was evicted."""
        return layer_reads.dense_keys(self.store), layer_reads.dense_values(self.store)

    def stored_mask(self) -> torch.Tensor:
        """Return `(B, H, T)` bool, which columns hold a token of a KV head: neither padding nor evicted."""
        return layer_reads.stored_mask(self.store)

    def storages(self, part: int | None = None) -> list[torch.Tensor]:
        """Return the tensors that take the memory of one of the parts, or of all; what is pending is the first's."""
        return layer_reads.storages(self.store, part)

    def padding(self) -> list[int]:
        """Return how many columns of each row are padding."""
        padding = self.store.padding()
        return [0] * self.batch if padding is None else padding.tolist()

    # One call of the model: update, attention, the expert router's choice

    @leave_group_on_error
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            `(B, H, Q, D)` and `(B, H, Q, Dv)`.

        Returns
        -------
        tuple of torch.Tensor
            For an attached model the new K/V alone, the keys carrying a reference to this layer, from which PiKV's
            attention function reads the history. Otherwise all K/V, `(B, H, T, D)` and `(B, H, T, Dv)`.

        Raises
        ------
        ValueError, RuntimeError
            If the tensors do not fit what is stored; nothing has changed then.
        """
        store, state, new = self.store, self.store.state, key_states.shape[2]
        check_fits(self.layer_idx, key_states, value_states, store.kv_format())
        in_place = self._reads_in_place()
        if self.leads and self.layout.exchange is not None and (new > 1 or not state.seen):
            self.prompt_mark = prompt_mark(key_states)
        if self.attachment is not None and not state.reference_lost:
            self.attachment.reads(self, prompt=not state.seen)
        awaits_press = self.awaits_press
        self.settle()
        if self.table is None:
            self.lazy_initialization(key_states, value_states)
        if self._snapshot_due:
            self.snapshot, self._snapshot_due = Snapshot.take(store), False
        history = state.seen > 0
        past = self._dense_history() if history and not in_place else None
        if new == 1 and history:
            store.append(key_states, value_states)
        else:
            store.pending = PendingTokens(key_states, value_states)
            self.awaits_press = awaits_press
        state.seen += new
        state.vetted &= in_place
        if self.has_expert_router and self.attachment is not None:
            self.attachment.expect(self)
        elif not in_place:
            self._settle_soon()
        if past is not None:
            return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)
        return (self._referring(key_states, history), value_states) if in_place else (key_states, value_states)

    def _reads_in_place(self) -> bool:
        """Return whether PiKV's attention function will see what `update` returns."""
        if self.attachment is None or not self.attachment.is_active(self.layer_idx):
            return False
        state = self.store.state
        if state.reference_out and state.history_out:
            raise RuntimeError(
                f"layer {self.layer_idx}: no attention has read the history that the last update referred to. Either "
                "that call was interrupted, or something between update and attention copies the keys. Take the call's "
                "tokens back with cache.crop(length)"
            )
        state.reference_lost |= state.reference_out
        return not state.reference_lost

    def _dense_history(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.state.evicted:
            raise RuntimeError(
                f"layer {self.layer_idx}: tokens were evicted, which only attn_implementation='pikv' can pass "
                "over, but this layer's attention is another one or does not see the cache"
            )
        return self.dense()

    def _referring(self, keys: torch.Tensor, history: bool) -> torch.Tensor:
        """Return new keys with a reference to this layer, by which the attention function finds it."""
        # A view of its own: the attribute must not outlive this call on a tensor that the caller keeps.
        keys = keys.view(keys.shape)
        setattr(keys, LAYER_ATTRIBUTE, self)
        self.state.reference_out, self.state.history_out = True, history
        return keys

    def attend_begins(self, valid: torch.Tensor | None) -> None:
        """Note which of the new tokens are real, `(B, Q)` bool or None for all, when attention has the reference."""
        state, pending = self.store.state, self.store.pending
        state.reference_out = False
        if pending is not None:
            pending.valid, pending.vetted = valid, True
        elif valid is not None:
            state.vetted = False

    def remember_queries(self, query: torch.Tensor, scale: float) -> None:
        """Remember the newest queries `(B, Hq, Q, D)`, by which the errors of pages that are packed next are judged."""
        self.store.remember_queries(query, scale)

    def attend_ends(self) -> None:
        """Store the new tokens soon if no expert router is to be awaited."""
        if not self.has_expert_router:
            self._settle_soon()

    def _settle_soon(self) -> None:
        """Store the new tokens before the next layer's: until then a press may take them as they came."""
        if self.pending is None or self.attachment is None:
            self.settle()
        else:
            self.attachment.linger(self)

    def rollback(self, tokens: int) -> None:
        """Take back the last update, of `tokens` tokens, which no attention has seen."""
        self.state.reference_out = False
        self.truncate(self.seen - tokens)

    @leave_group_on_error
    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers, and place what was waiting for them."""
        store = self.store
        expected = self.batch * (1 if store.pending is None else store.pending.tokens)
        if experts.numel() != expected:
            raise RuntimeError(
                f"layer {self.layer_idx}: the router chose experts for {experts.numel()} tokens, "
                f"the cache got {expected}"
            )
        if store.pending is None:
            store.record_experts(experts)
            return
        store.pending.experts = experts.view(self.batch, -1)
        self.settle_marks()
        self._place_unless_pressed()

    def _place_unless_pressed(self) -> None:
        pending = self.store.pending
        if pending is not None and pending.experts is not None and not self.awaits_press:
            self.store.place(pending.experts)

    @leave_group_on_error
    def settle(self) -> None:
        """Store what is pending, where no router is awaited, and move what has left the window to its shards."""
        self.assignment.require_complete(self.layer_idx)
        self.settle_marks()
        self.awaits_press = False
        self.store.settle()

    def settle_unless_awaited(self) -> None:
        """Store what is pending, unless a router, a press or an assignment has yet to say what."""
        awaited = self.has_expert_router and self.pending is not None and self.pending.experts is None
        if self.assignment.staged is None and not self.awaits_press and not awaited:
            self.settle()

    def _tokens_changed(self) -> None:
        """Forget what was true only of the tokens as they were."""
        for part in self.parts:
            part.slots = None
        self.snapshot = None
        self.assignment.forget()
        if self.attachment is not None:
            self.attachment.forget(self)

    # Presses

    def begin_press(self) -> None:
        """Wait with the next call's tokens for :meth:`keep`, at the latest until the call after it."""
        self.settle()
        self.awaits_press = True

    def end_press(self) -> None:
        """End :meth:`begin_press`: the tokens are stored as they would have been."""
        self.awaits_press = False
        self._place_unless_pressed()

    @leave_group_on_error
    def keep(self, kept: torch.Tensor) -> None:
        """Evict tokens, each KV head its own, and keep the others in the widths given; frees their memory.

        Columns stay what they are: lengths do not change, an evicted token never takes part again. Tokens that a codec
        has packed stay as they are where they are kept.

        Parameters
        ----------
        kept : torch.Tensor
            `(B, H, T)` over all columns. Bool: True keeps a token, as the codecs of the configuration have it outside
            of sinks and recent window. Integers: 0 evicts, 2, 4, 8 and 16 are the bits per number, 16 as the model
            made it.

        Raises
        ------
        ValueError, TypeError
            For a wrong shape, dtype or width; nothing has changed then.
        """
        press_eviction.check_evicts(self.store, self.attachment is not None)
        press_eviction.keep_tokens(self.store, kept)
        self._tokens_changed()
        self.awaits_press = False

    def settle_marks(self) -> None:
        """Evict what kvpress's head-wise presses have only marked on the attention module."""
        marks = None if self.attachment is None else self.attachment.take_marks(self)
        if marks is not None and self.table is not None:
            self.keep(press_eviction.kept_by_marks(self.store, marks))

    def packed_pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pages of what is kept or packed: they stay as they are, or go as a whole.

        Returns
        -------
        tuple of torch.Tensor
            `(n,)` int64 sequences, `(n, H, P)` int64 columns of the page's tokens in each KV head, -1 where it has
            none, and `(n,)` int64 bytes. Pages that several sequences share come once for each.
        """
        return press_eviction.packed_pages(self.store)

    def recode(
        self, key_basis: torch.Tensor | None = None, value_basis: torch.Tensor | None = None, **options: Any
    ) -> None:
        """Choose the codecs of this layer anew, before it has stored a token.

        Parameters
        ----------
        key_basis, value_basis : torch.Tensor, optional
            `(H, D, rank)`, what low-rank codecs would otherwise fit to the first pages.
        **options
            `key_codec`, `value_codec`, `error_budget`, `rank`: see :class:`PiKVConfig`.

        Raises
        ------
        ValueError
            If the layer has stored tokens; what is pending does not count.
        """
        self.store.recode(key_basis, value_basis, options)

    # K/V assigned from outside

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys by column, dense; None before the first update. To change them assign keys, then values."""
        staged = self.assignment.staged
        return self._hand_out("keys", layer_reads.dense_keys) if staged is None else staged

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self.assignment.staged = keys

    @property
    def values(self) -> torch.Tensor | None:
        """The values by column, dense; None before the first update. Assigning them completes an assignment."""
        return self._hand_out("values", layer_reads.dense_values)

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        staged = self.assignment.take_staged()
        keys, values = check_assigned(self.store, self.keys if staged is None else staged, values)
        if self.assignment.is_crop(keys, values):
            self.truncate(values.shape[2])
        else:
            assign_tokens(self.store, keys, values, may_be_picked=self.attachment is not None)
            self._tokens_changed()

    def _hand_out(self, name: str, read: Callable[[LayerStore], torch.Tensor]) -> torch.Tensor | None:
        if self.table is None:
            return None
        self.settle_marks()
        return self.assignment.hand_out(name, read(self.store))

    # Lengths

    def get_seq_length(self) -> int:
        """Return the number of columns: positions seen, padding and evicted tokens included, or what was assigned."""
        return self.seen

    def get_mask_sizes(self, cache_position: torch.Tensor | int) -> tuple[int, int]:
        """Return `(kv_length, kv_offset)` of the mask for the coming call, in the model's positions."""
        new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        return self.state.positions_seen + new, 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum length."""
        return -1

    #: transformers' name from 5.14 on.
    get_max_length = get_max_cache_shape

    def request_snapshot(self) -> None:
        """Have the next update snapshot the tables, so that a crop to the present length is exact whatever it packs.

        kvpress's pipeline asks each layer's length before a question and cuts the answer off afterwards.
        """
        self._snapshot_due = True

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length`; see :func:`cropped_length`.

        Raises
        ------
        ValueError
            Where K/V were assigned from outside and the length reaches into them: their positions are not known.
        """
        self.truncate(self.column_of(cropped_length(self.state.positions_seen, max_length)))

    def column_of(self, length: int) -> int:
        """Return the columns that remain of the model's first `length` positions; see :meth:`crop`."""
        return column_of(self.store, length)

    @leave_group_on_error
    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        store, state = self.store, self.store.state
        if length >= state.seen or self.table is None:
            return
        if length <= store.stored:
            store.pending = None
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is not None and snapshot.length == length:
            snapshot.restore(store)
        else:
            self.settle()
            crop_tables(store, length)
        shorten_state(store, length)
        self._tokens_changed()
        state.reference_lost |= state.reference_out and not state.history_out
        state.reference_out = False

    # Rows and copies

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        self.select([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`."""
        if self.table is not None:
            self.select(torch.arange(self.batch)[indices.cpu()].tolist())

    @leave_group_on_error
    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`. No token is copied."""
        if self.table is not None:
            self.settle_marks()
            self.snapshot = None
            self.assignment.forget()
            self.store.select(indices)

    def fork(self) -> "PiKVLayer":
        """Return a copy that shares all pages until either side writes to them."""
        self.settle()
        parts = [part.fork(self.config) for part in self.parts]
        twin = PiKVLayer(self.layer_idx, self.config, self.attachment, self.layout, parts, self.leads)
        twin.store.go_on_from(self.store)
        twin.prompt_mark = self.prompt_mark
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVLayer":
        return self.fork()

    def offload(self) -> None:
        """Refuse: transformers' own offloading moves whole dense layers, which this cache does not have."""
        raise NotImplementedError("PiKVCache cannot be moved by transformers' offloading; leave offloading=False")

    prefetch = offload
