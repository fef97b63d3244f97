"""One layer of the cache: the protocol that transformers, the attention function and presses speak to it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..common.kv import KV
from ..config import PiKVConfig
from ..distributed.device_layout import PartLayout
from ..distributed.process_exchange import leave_group_on_error
from ..page_table.page_table import PageTable
from . import layer_reads
from .input_checks import KVFormat, admit, check_not_padded
from .layer_cropping import column_of, cropped_length
from .layer_edits import LayerEdits
from .layer_operation import layer_operation
from .layer_part import LayerPart, make_parts
from .layer_reference import LayerReference
from .layer_state import LayerState
from .layer_store import LayerStore
from .model_link import ModelLink
from .pending_tokens import PendingTokens
from .row_choice import beam_rows, rows_at
from .taking_in import take_back, take_in


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
    indexer_dim : int
        Channels of the keys of an indexer, 0 without one; see :class:`~pikv_hf.layer.indexed_layer.IndexedLayer`.

    Attributes
    ----------
    store : LayerStore
        The tokens, stored and pending.
    edits : LayerEdits
        Settles what is pending and changes tokens for all but the model.
    reference : LayerReference
        Knows whether PiKV's attention finds the layer.
    prompt_mark : torch.Tensor or None
        Of a prompt that the processes have not agreed on yet.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        layer_idx: int,
        config: PiKVConfig,
        attachment: ModelLink | None = None,
        layout: PartLayout | None = None,
        parts: list[LayerPart] | None = None,
        leads: bool = False,
        indexer_dim: int = 0,
    ) -> None:
        self.layer_idx, self.attachment, self.leads = layer_idx, attachment, leads
        self.layout = PartLayout() if layout is None else layout
        self.exchange = self.layout.exchange
        self._may_absorb = attachment is not None and attachment.caches_latents(layer_idx)
        if parts is None:
            parts = make_parts(layer_idx, config, self.layout, latent=self._may_absorb)
        self.parts = parts
        routers = {} if attachment is None or config.placement == "hash" else attachment.expert_routers
        self.has_expert_router = layer_idx in routers
        experts = routers[layer_idx].num_experts if self.has_expert_router else 0
        self.store = LayerStore(layer_idx, config, self.layout, self.parts, experts, indexer_dim)
        self.edits = LayerEdits(self.store, attachment)
        self.reference = LayerReference(self.store, attachment)
        self.prompt_mark: torch.Tensor | None = None

    @layer_operation
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pools and page tables for K/V of these shapes, where the layer has none."""
        self.store.begin_if_empty(KVFormat.of(key_states, value_states))

    @layer_operation
    def reset(self) -> None:
        """Forget everything and return the memory."""
        self.store.clear()
        self.edits.reset()
        self.prompt_mark = None

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""
        return self.store.lock

    @property
    def config(self) -> PiKVConfig:
        """Options of the layer."""
        return self.store.config

    @property
    def state(self) -> LayerState:
        """What is known of the tokens, as a fork copies it and a file holds it."""
        return self.store.state

    @property
    def decides_jointly(self) -> bool:
        """Whether all layers of the cache decide together what each keeps within a budget."""
        scheduler = self.parts[0].scheduler
        return scheduler is not None and scheduler.jointly

    @property
    def is_initialized(self) -> bool:
        """Whether pools and page tables exist."""
        return self.store.state.is_initialized

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, once there are some."""
        return self.store.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer's attention computes, once there are keys and values."""
        return self.store.device

    @property
    def seen(self) -> int:
        """Columns, pending and evicted ones and padding included."""
        return self.store.state.seen

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first update."""
        return self.store.batch

    @property
    def pending(self) -> PendingTokens | None:
        """New tokens that wait for the expert router, or for a press."""
        return self.store.pending

    @property
    def table(self) -> PageTable | None:
        """What the first part stores: everything but shards on other devices."""
        return self.parts[0].table

    def kv_format(self) -> KVFormat | None:
        """Return what new K/V must be like, None while the layer is empty."""
        return self.edits.latents.kv_format()

    @layer_operation
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all K/V by column, `(B, H, T, D)` and `(B, H, T, Dv)`; zeros for padding and what was evicted."""
        return self.edits.latents.dense_pair()

    @layer_operation
    def stored_mask(self) -> torch.Tensor:
        """Return `(B, H, T)` bool, which columns hold a token of a KV head: neither padding nor evicted."""
        return self.edits.latents.stored_mask()

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
            In a forward of the attached model's attention what :meth:`update_from_attention` returns. For all others
            all K/V, `(B, H, T, D)` and `(B, H, T, Dv)`.

        Raises
        ------
        ValueError
            If the tensors do not fit what is stored, or are those of training; nothing has changed then.
        RuntimeError
            If the attention of the call before did not read what it was referred to.
        """
        if self.attachment is None or self.attachment.takes_update(self):
            return self.update_from_attention(key_states, value_states)
        return self.update_from_outside(key_states, value_states)

    def update_from_attention(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; return what the layer's attention needs to attend over all; see :meth:`update`.

        With PiKV's attention that is the new K/V alone, carrying a reference to this layer, from which it reads the
        history; with another it is all K/V.
        """
        link, state, latents = self.attachment, self.store.state, self.edits.latents
        keys, values = admit(self.layer_idx, key_states, value_states, latents.kv_format(), link)
        in_place, history = self.reference.is_expected(), state.seen > 0
        # The layer that was read before may be another cache's.
        if link is not None and not state.reference_lost and not (history and self.edits.is_read):
            link.reads(self.edits, prompt=not history)
        stored = latents.of_call(keys, values, in_place and not self.edits.awaits_press)
        new, past = keys.shape[2], take_in(self, *stored, in_place)
        try:
            if past is not None:
                # Out of what is stored no gradient comes, out of the new K/V it may.
                keys, values = layer_reads.with_history(past, keys, values)
            if in_place or state.reference_lost:
                keys, values = self.reference.put_on(keys, values, self)
                if link is not None and self._may_absorb and link.absorbs(self.layer_idx):
                    link.refer(self)
            if self.has_expert_router and link is not None:
                link.expect(self.edits)
            elif not in_place:
                self.edits.settle_soon()
        except BaseException:
            take_back(self, new)
            raise
        if in_place:
            state.reference_out, state.history_out = True, history
        return keys, values

    def update_from_outside(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K/V that no forward of the attached model brings, by position, and return all; see :meth:`update`."""
        keys, values = admit(self.layer_idx, keys, values, self.kv_format(), self.attachment)
        check_not_padded(self.layer_idx, self.store.is_padded)
        self.reference.check_history_was_read()
        self.edits.latents.expand()
        past, new = take_in(self, keys, values, in_place=False), keys.shape[2]
        try:
            if past is not None:
                keys, values = layer_reads.with_history(past, keys, values)
            if not self.store.awaits_indexer:
                self.edits.settle()
        except BaseException:
            take_back(self, new)
            raise
        return keys, values

    def attend_begins(self, valid: torch.Tensor | None) -> None:
        """Take, with the reference, which of several new tokens are to be stored, `(B, Q)` bool or None for all."""
        store = self.store
        store.state.reference_out = store.state.reference_lost = False
        if store.pending is not None:
            store.pending.valid = valid

    def attend_ends(self) -> None:
        """Store the new tokens soon if no expert router is to be awaited."""
        if not self.has_expert_router:
            self.edits.settle_soon()

    def rollback(self, tokens: int) -> None:
        """Take back the last update, of `tokens` tokens, which no attention has seen."""
        self.state.reference_out = False
        self.truncate(self.seen - tokens)

    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers, and place what was waiting for them."""
        self.edits.record_experts(experts)

    def settle(self) -> None:
        """Store what is pending, and move what has left the window to its shards."""
        self.edits.settle()

    # Presses

    def keep(self, kept: torch.Tensor) -> None:
        """Evict tokens, each KV head its own, and keep the others in the widths given; frees their memory.

        Columns stay what they are: lengths do not change, an evicted token never takes part again. Tokens that a codec
        has packed stay as they are where they are kept, unless they are to have fewer bits than they have.

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
        self.edits.keep(kept)

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys by column, dense; None before the first update. To change both assign keys, then values."""
        staged = self.edits.assignment.staged
        return self.edits.hand_out(KV.KEYS) if staged is None else staged

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self.edits.stage_keys(keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The values by column, dense; None before the first update. Assigning them completes an assignment."""
        return self.edits.hand_out(KV.VALUES)

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self.edits.assign_values(values)

    # Lengths

    def get_seq_length(self) -> int:
        """Return the number of columns: positions seen, padding and evicted tokens included, or what was assigned."""
        return self.seen

    def get_mask_sizes(self, cache_position: torch.Tensor | int) -> tuple[int, int]:
        """Return `(kv_length, kv_offset)` of the mask for the coming call, in the model's positions.

        Raises
        ------
        ValueError
            If the attached model would pass over its cache in that call.
        """
        if self.attachment is not None:
            self.attachment.check_reads_caches(self.layer_idx)
        new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        return self.state.positions_seen + new, 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum length."""
        return -1

    #: transformers' name from 5.14 on.
    get_max_length = get_max_cache_shape

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length`; see :func:`cropped_length`.

        Raises
        ------
        ValueError
            Where K/V were assigned from outside and the length reaches into them: their positions are not known.
        """
        length = cropped_length(self.state.positions_seen, max_length)
        self.truncate(column_of(self.store, length))
        if not length:
            self.state.dropped = 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        self.edits.truncate(length)

    # Rows and copies

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        self.edits.select(beam_rows(beam_idx).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        self.edits.select([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows at `indices`."""
        if self.table is not None:
            self.edits.select(rows_at(indices, self.batch).tolist())

    @layer_operation
    def fork(self) -> "PiKVLayer":
        """Return a copy that shares all pages until either side writes to them."""
        self.settle()
        parts = [part.fork(self.config) for part in self.parts]
        made = self.layer_idx, self.config, self.attachment, self.layout, parts, self.leads, self.store.indexer_dim
        twin = type(self)(*made)
        twin.store.go_on_from(self.store)
        twin.edits.latents.go_on_from(self.edits.latents)
        twin.prompt_mark, twin.reference.code = self.prompt_mark, self.reference.code
        if self.edits.joint is not None:
            self.edits.joint.forked(twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVLayer":
        return self.fork()

    def offload(self) -> None:
        """Refuse: transformers' own offloading moves whole dense layers, which this cache does not have."""
        raise NotImplementedError("PiKVCache cannot be moved by transformers' offloading; leave offloading=False")

    prefetch = offload
