"""One layer of the cache: the protocol that transformers, attention and routers speak to it."""

from typing import Any

import torch

from ..distributed.lockstep import prompt_mark
from ..distributed.process_exchange import leaves_others
from ..page_table.cropping import crop
from ..page_table.layer_encoders import MAX_OBSERVED
from .input_checks import check_fits
from .layer_edits import LayerEdits
from .pending_tokens import PendingTokens

# The attribute of a returned key tensor by which the attention function finds the layer.
LAYER_ATTRIBUTE = "_pikv_layer"


# Queries kept of each KV head to judge the errors of packed keys by: of these newest positions, at most MAX_OBSERVED.
OBSERVED_POSITIONS = 8


class PiKVLayer(LayerEdits):
    """The paged K/V of one attention layer.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Page size, window, shards.
    attachment : Attachment, optional
        The attached model. Without one, `update` returns dense K/V for any attention implementation.
    layout : Layout, optional
        Where its parts are; by default one, on the layer's own device.
    """

    # Updating

    @leaves_others
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
        check_fits(self.layer_idx, key_states, value_states, self._kv_format())
        in_place = self._reads_in_place()
        if self.leads and self.layout.exchange is not None and (key_states.shape[2] > 1 or not self.state.seen):
            self.prompt_mark = prompt_mark(key_states)
        if self.attachment is not None and not self.state.reference_lost:
            self.attachment.reads(self, prompt=not self.state.seen)
        holds = self.awaits_press
        self.settle()
        if self.table is None:
            self.lazy_initialization(key_states, value_states)
        self._remember()
        history = self.state.seen > 0
        if history and not in_place:
            if self.state.evicted:
                raise RuntimeError(
                    f"layer {self.layer_idx}: tokens were evicted, which only attn_implementation='pikv' can pass "
                    "over, but this layer's attention is another one or does not see the cache"
                )
            past = self.dense()
        if key_states.shape[2] == 1 and history:
            self._append(key_states, value_states)
        else:
            self.pending = PendingTokens(key_states, value_states)
            self.awaits_press = holds
        self.state.seen += key_states.shape[2]
        self.state.vetted &= in_place
        if self.has_expert_router and self.attachment is not None:
            self.attachment.expect(self)
        elif not in_place:
            self._settle_soon()
        if not in_place:
            if not history:
                return key_states, value_states
            return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)
        # A view of its own: the attribute must not outlive this call on a tensor that the caller keeps.
        keys = key_states.view(key_states.shape)
        setattr(keys, LAYER_ATTRIBUTE, self)
        self.state.reference_out, self.state.history_out = True, history
        return keys, value_states

    def _reads_in_place(self) -> bool:
        """Return whether PiKV's attention function will see what `update` returns."""
        if self.attachment is None or not self.attachment.is_active(self.layer_idx):
            return False
        if self.state.reference_out and self.state.history_out:
            raise RuntimeError(
                f"layer {self.layer_idx}: no attention has read the history that the last update referred to. Either "
                "that call was interrupted, or something between update and attention copies the keys. Take the call's "
                "tokens back with cache.crop(length)"
            )
        self.state.reference_lost |= self.state.reference_out
        return not self.state.reference_lost

    def attend_begins(self, valid: torch.Tensor | None) -> None:
        """Take the attention function's word on padding.

        Parameters
        ----------
        valid : torch.Tensor, optional
            `(B, Q)` bool, which of the new tokens are real, or None if all are.
        """
        self.state.reference_out = False
        if self.pending is not None:
            self.pending.valid, self.pending.vetted = valid, True
        elif valid is not None:
            self.state.vetted = False

    def remember_queries(self, query: torch.Tensor, scale: float) -> None:
        """Remember the newest queries `(B, Hq, Q, D)`, by which the errors of pages that are packed next are judged."""
        if self.lanes > 1:
            # A page of a lane is of any head: no queries are those of all pages.
            return
        batch, _, new, dim = query.shape
        for table in self.tables():
            encoders = table.pools.encoders
            if not encoders.packs or (
                new == 1 and encoders.queries is not None and self.state.seen % self.config.page_size
            ):
                # Pages fill now and then: looking at every decoded token would only cost time.
                continue
            recent = query[:, :, -OBSERVED_POSITIONS:].reshape(batch, self.heads, -1, dim).transpose(0, 1)
            few = recent.reshape(self.heads, -1, dim)[:, :MAX_OBSERVED].clone()
            encoders.remember_queries(few.to(table.plain.device), scale)

    def attend_ends(self) -> None:
        """Store the new tokens soon if no router is to be awaited."""
        if not self.has_expert_router:
            self._settle_soon()

    def _settle_soon(self) -> None:
        """Store the new tokens before the next layer's: until then a press may take them as they came."""
        if self.pending is None or self.attachment is None:
            self.settle()
        else:
            self.attachment.linger(self)

    def settle_unless_held(self) -> None:
        """Store what is pending, unless a router or a press has yet to say where."""
        awaited = self.has_expert_router and self.pending is not None and self.pending.experts is None
        if self._staged is None and not self.awaits_press and not awaited:
            self.settle()

    def rollback(self, tokens: int) -> None:
        """Take back the last update, of `tokens` tokens, which no attention has seen."""
        self.state.reference_out = False
        self.truncate(self.state.seen - tokens)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one decoded token per row into the window; its expert follows from the router."""
        keys, values = self._by_lane(keys).squeeze(2), self._by_lane(values).squeeze(2)
        for part, table in zip(self.parts, self.tables(), strict=True):
            # Until pages change hands again, as many tokens as fit into a page may come.
            part.enforce(self.lanes, self.state.seen, headroom=table.plain.page_size)
        if any(table.is_at_page_end for table in self.tables()):
            self._in_all_parts(lambda part, _: part.append(keys, values, self.state.seen))
        else:
            self._append_in_page(keys, values)
        self._note_evictions()

    def _append_in_page(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one decoded token per row where every part has a slot for it: no page changes hands."""
        try:
            for part in self.parts:
                part.append(keys, values, self.state.seen)
        except BaseException:
            # Those that have the token already let go of it.
            for table in self.tables():
                crop(table, self.state.seen)
            raise

    @leaves_others
    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers, and place what was waiting for them."""
        assert self.table is not None
        batch = self.batch
        expected = batch if self.pending is None else batch * self.pending.tokens
        if experts.numel() != expected:
            raise RuntimeError(
                f"layer {self.layer_idx}: the router chose experts for {experts.numel()} tokens, "
                f"the cache got {expected}"
            )
        if self.pending is not None:
            self.pending.experts = experts.view(batch, -1)
            self.settle_marks()
            if self.pending is not None and not self.awaits_press:
                self._place(self.pending.experts)
        else:
            chosen = self._row_by_lane(experts.view(-1)).to(torch.int16)
            for part in self.parts:
                part.record_experts(chosen)

    # Lengths

    def get_seq_length(self) -> int:
        """Return the number of columns: positions seen, padding and evicted tokens included, or what was assigned."""
        return self.state.seen

    def get_mask_sizes(self, cache_position: torch.Tensor | int) -> tuple[int, int]:
        """Return `(kv_length, kv_offset)` of the mask for the coming call, in the model's positions."""
        new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        return self.positions_seen + new, 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum length."""
        return -1

    def get_max_length(self) -> int:
        """Return -1: the layer has no maximum length (transformers' name from 5.14 on)."""
        return -1

    # Changing rows and length

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

    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        if length >= self.state.seen or self.table is None:
            return
        super().truncate(length)
        self.state.reference_lost |= self.state.reference_out and not self.state.history_out
        self.state.reference_out = False

    def fork(self) -> "PiKVLayer":
        """Return a copy that shares all pages until either side writes to them."""
        twin = PiKVLayer(self.layer_idx, self.config, self.attachment, self.layout)
        self._copy_to(twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVLayer":
        return self.fork()

    def offload(self) -> None:
        """Refuse: transformers' own offloading moves whole dense layers, which this cache does not have."""
        raise NotImplementedError("PiKVCache cannot be moved by transformers' offloading; leave offloading=False")

    prefetch = offload
