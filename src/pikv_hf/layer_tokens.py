"""The tokens of one attention layer: stored, waiting, kept and assigned."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers.cache_utils import CacheLayerMixin

from .assignment import HandedOut, is_selection
from .checks import Held, check_fits, cropped_length
from .config import PiKVConfig
from .eviction import config_of_lanes
from .pages import PagePool
from .pending import Pending
from .placement import expert_placement, hash_placement
from .retention import assigned_table, checked_widths, equal_rows, kept_table, with_exact_ends
from .routing import Router, make_routing
from .schedule import LayerSchedule
from .store import PageStore
from .table import PageTable
from .tiers import LayerTiers, Tiers
from .writer import SequenceWriter, ShardOf

if TYPE_CHECKING:
    from .attachment import Attachment

_Result = TypeVar("_Result")


class LayerTokens(CacheLayerMixin):
    """What a layer holds, by *column*: the position of a token within the layer.

    Columns are the model's own positions until K/V are assigned from outside, as kvpress does: an assignment numbers
    its tokens anew, and the layer remembers how many positions the model has seen beyond them.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Page size, window, shards, codecs.
    attachment : Attachment, optional
        The attached model.

    Attributes
    ----------
    table : PageTable or None
        What is stored. Its rows are sequences, or lanes of one KV head once heads keep different tokens.
    pending : Pending or None
        New tokens that wait for the layer's router, or for a press.
    seen, dropped : int
        Columns, evicted ones and padding included, and the positions that the model has seen beyond them.
    router : Router or None
        Chooses what decoding steps read; None if they read everything.
    schedule : LayerSchedule or None
        Evicts what exceeds a budget.
    holds : bool
        Whether a press will decide at the end of the call what is kept; until then nothing is packed.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, layer_idx: int, config: PiKVConfig, attachment: "Attachment | None" = None) -> None:
        self.layer_idx = layer_idx
        self.config = config
        self.attachment = attachment
        self.routed = attachment is not None and config.placement != "hash" and layer_idx in attachment.routers
        policy = make_routing(config)
        self.schedule: LayerSchedule | None = None
        self.router = None if policy is None else Router(policy, config.sink_tokens, config.recent_window)
        # The cache replaces it by a part of its own, so that its layers share limits and counters.
        self.tiers: LayerTiers | None = None if config.tiers is None else Tiers(config, 1).layer(layer_idx)
        self._clear()

    def _clear(self) -> None:
        self.table: PageTable | None = None
        self.pending: Pending | None = None
        self.seen = self.dropped = 0
        self.holds = False
        self.is_initialized = False
        # Whether every stored token is known to be real. Then a causal mask hides none of them, and is not looked at.
        self.vetted = True
        # `(B,)` columns of padding in each row, None if there are none.
        self._padding: torch.Tensor | None = None
        # Whether some columns hold no token although they are not padding.
        self.evicted = False
        self._slots: torch.Tensor | None = None
        # Columns of the last assignment: the model's positions of tokens among them are not known.
        self._assigned = 0
        self._handed: dict[str, HandedOut] = {}
        self._staged: torch.Tensor | None = None
        self._returns = False
        self._checkpoint: tuple[int, PageTable, set[str]] | None = None

    def _shard_of(self) -> ShardOf:
        if self.routed and self.attachment is not None:
            num_experts = self.attachment.routers[self.layer_idx].num_experts
            return expert_placement(num_experts, self.config.num_shards, self.layer_idx)
        return hash_placement(self.config.page_size, self.config.num_shards)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pool and page table for K/V of these shapes."""
        batch, self.heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        config, per_head = self.config, self.schedule is not None and self.schedule.policy.per_head
        pool = PagePool(
            1 if per_head else self.heads, dim, value_states.shape[-1], config.page_size, self.dtype, self.device
        )
        pages = PageStore(pool, config_of_lanes(config) if per_head else config, self.tiers)
        writer = SequenceWriter(pages, config.num_shards, config.recent_window, config.sink_tokens, self._shard_of())
        table = PageTable(writer, batch * self.heads if per_head else batch)
        if self.schedule is not None:
            self.schedule.prepare(table)
        if self.router is not None:
            pages.know_bounds()
        self.table, self.is_initialized = table, True

    @property
    def lanes(self) -> int:
        """Rows of the table per sequence: 1, or one per KV head once heads keep different tokens."""
        return 1 if self.table is None else self.heads // self.table.pool.keys.shape[0]

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first update."""
        return 0 if self.table is None else len(self.table.rows) // self.lanes

    @property
    def positions_seen(self) -> int:
        """Positions that the model has seen, padding included."""
        return self.seen + self.dropped

    def _held(self) -> Held | None:
        if self.table is None:
            return None
        pool = self.table.pool
        return (self.batch, self.heads, pool.keys.shape[3], pool.values.shape[3]), self.dtype, self.device

    def _by_lane(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `(B, H, Q, D)` as the table's rows have it, `(B * H, 1, Q, D)` if these are lanes."""
        return tokens if self.lanes == 1 else tokens.reshape(-1, 1, *tokens.shape[2:])

    def _row_by_lane(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(self.lanes, dim=0)

    # Storing

    def settle(self) -> None:
        """Store what is pending, where no router is awaited, and move what has left the window to its shards."""
        if self._staged is not None:
            staged, self._staged = self._staged, None
            raise RuntimeError(
                f"layer {self.layer_idx}: keys {tuple(staged.shape)} were assigned without values; assign both"
            )
        self.settle_marks()
        self.holds = False
        if self.pending is not None:
            experts = self.pending.experts
            if experts is None:
                experts = torch.full((self.batch, self.pending.tokens), -1, device=self.device)
            self._place(experts)
        if self.table is not None:
            self._with_room(self.table.flush)
            self._enforce()

    def _with_room(self, work: Callable[[], _Result]) -> _Result:
        """Do what may need new pages, within the budget."""
        if self.schedule is None:
            return work()
        assert self.table is not None
        result = self.schedule.with_room(self.table, self.seen, work)
        self._note_evictions()
        return result

    def _enforce(self, headroom: int = 0) -> None:
        """Evict what exceeds a budget in tokens, if pages have changed hands since this was last done."""
        if self.schedule is not None and self.table is not None and self.table.is_at_page_end:
            self.schedule.enforce(self.table, self.lanes, self.seen, headroom)
            self._note_evictions()

    def _place(self, experts: torch.Tensor) -> None:
        assert self.table is not None
        assert self.pending is not None
        new, start = self.pending, self.seen - self.pending.tokens
        positions = torch.arange(start, self.seen, dtype=torch.int32, device=self.device)
        tokens = self._by_lane(new.keys), self._by_lane(new.values), self._row_by_lane(experts).to(torch.int16)
        valid = None if new.valid is None else self._row_by_lane(new.valid)
        masses = None
        if new.masses is not None:
            masses = new.masses.mean(dim=1) if self.lanes == 1 else new.masses.flatten(0, 1)
        try:
            for first in range(0, new.tokens, piece := self._piece(new)):
                self._store(tokens, positions, valid, masses, slice(first, first + piece))
        except BaseException:
            self.table.crop(start)
            raise
        self._drop_pending()

    def _piece(self, new: Pending) -> int:
        """Return how many of the new tokens to store before pages may have to go."""
        if self.schedule is None:
            return max(1, new.tokens)
        per_token = (new.keys[:, :, :1].numel() + new.values[:, :, :1].numel()) * new.keys.element_size()
        return min(max(1, new.tokens), self.schedule.piece(self.seen, self.config.page_size, per_token))

    def _store(
        self,
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        masses: torch.Tensor | None,
        part: slice,
    ) -> None:
        """Store some of the new tokens, of all rows."""
        assert self.table is not None
        keys, values, experts = tokens[0][:, :, part], tokens[1][:, :, part], tokens[2][:, part]
        real = None if valid is None else valid[:, part]
        table, at = self.table, positions[part]
        self._with_room(lambda: table.store(keys, values, at, experts, real))
        if self.schedule is not None:
            if masses is not None:
                self.schedule.credit(table, masses[:, part], int(at[0]))
            self._enforce()

    def _drop_pending(self) -> None:
        """Forget what was pending, once it is stored."""
        if self.pending is not None:
            self.vetted &= self.pending.vetted
            self._padding = self._padding_with_pending()
            self.pending = None

    def _interrupt(self) -> None:
        """The tokens of the last call are no longer what the router will speak of."""
        self._slots = self._checkpoint = None
        self._handed = {}
        if self.attachment is not None:
            self.attachment.forget(self)

    # Reading

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all K/V by column, `(B, H, T, D)` and `(B, H, T, Dv)`; zeros for padding and what was evicted."""
        return self._dense(True), self._dense(False)

    def _dense(self, keys: bool) -> torch.Tensor:
        assert self.table is not None
        new = None
        if self.pending is not None:
            new = self.pending.keys if keys else self.pending.values
            if self.pending.tokens == self.seen:
                return new
        stored = self.seen - (0 if self.pending is None else self.pending.tokens)
        past = self.table.dense_part(stored, keys)
        past = past.reshape(self.batch, self.heads, stored, past.shape[-1])
        return past if new is None else torch.cat([past, new], dim=2)

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys by column, dense; None before the first update. To change them assign keys, then values."""
        return self._staged if self._staged is not None else self._hand_out("keys")

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._staged = keys

    @property
    def values(self) -> torch.Tensor | None:
        """The values by column, dense; None before the first update. Assigning them completes an assignment."""
        return self._hand_out("values")

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        keys, self._staged = self._staged, None
        if keys is None:
            keys = self._hand_out("keys")
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise TypeError(f"layer {self.layer_idx}: expected tensors of keys and values, got {type(values).__name__}")
        check_fits(self.layer_idx, keys, values, self._held())
        handed = self._handed
        if {"keys", "values"} <= set(handed) and handed["keys"].is_prefix(keys) and handed["values"].is_prefix(values):
            self.truncate(values.shape[2])
        else:
            self._assign(keys, values)

    def _hand_out(self, name: str) -> torch.Tensor | None:
        if self.table is None:
            return None
        self.settle_marks()
        dense = self._dense(name == "keys")
        self._handed[name] = HandedOut(dense)
        return dense

    def storages(self) -> list[torch.Tensor]:
        """Return the tensors that hold this layer's memory."""
        held = [] if self.table is None else self.table.pages.tensors()
        if self.schedule is not None:
            held += self.schedule.tensors()
        return held if self.pending is None else [*held, self.pending.keys, self.pending.values]

    # Assigning K/V from outside

    def _assign(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all tokens: the layer counts them 0..T-1."""
        if self.table is None:
            self.lazy_initialization(keys, values)
        if self._padding_with_pending() is not None:
            raise ValueError(
                f"layer {self.layer_idx}: K/V of {keys.shape[2]} tokens per row were assigned, but rows of this batch "
                "are padded, so a press has taken padding for tokens. Wrap it: pikv_hf.presses.RowwisePress(press)"
            )
        seen = self.positions_seen
        picked = self.attachment is not None and keys.shape[2] <= self.seen and is_selection(keys, self._dense(True))
        # What was evicted was handed out as zeros, and comes back as such: it is no token now either.
        held = (keys != 0).any(dim=-1) | (values != 0).any(dim=-1) if self.evicted else None
        leaders = equal_rows(keys, values, batch=self.batch)
        # Where the tokens' experts were known they are not any more: they are spread over the shards page by page.
        table = assigned_table(keys, values, held, self.config, self._shard_of(), leaders, self.tiers)
        self._fit(table, keys.shape[2])
        self._interrupt()
        self._drop_pending()
        self.table = table
        self.evicted = held is not None and not bool(held.all())
        self.seen = self._assigned = keys.shape[2]
        # Tokens that were only picked keep the rotation of their positions; what comes next goes on after the last one.
        self.dropped = seen - self.seen if picked else 0
        self._note_evictions()

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
        if self.table is not None and any(self.table.tokens()):
            raise ValueError(
                f"layer {self.layer_idx} has stored {max(self.table.tokens())} tokens; its codecs can be chosen only "
                "before, and a stored token is never packed again"
            )
        self.config = dataclasses.replace(self.config, **options)
        if self.pending is not None:
            self.lazy_initialization(self.pending.keys, self.pending.values)
        if self.table is not None:
            self.table.pages.set_bases(key_basis, value_basis)

    # Evicting

    def hold(self) -> None:
        """Wait with the next call's tokens for :meth:`keep`, at the latest until the call after it."""
        self.settle()
        self.holds = True

    def release(self) -> None:
        """End :meth:`hold`: the tokens are stored as they would have been."""
        self.holds = False
        if self.pending is not None and self.pending.experts is not None:
            self._place(self.pending.experts)

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
        if self.table is None:
            raise ValueError(f"layer {self.layer_idx} holds no tokens, of which some could be kept")
        if self.attachment is None:
            raise ValueError(
                f"layer {self.layer_idx}: only PiKV's attention can pass over evicted tokens; make the cache with "
                "PiKVCache.for_model(model)"
            )
        widths = checked_widths(kept, (self.batch, self.heads, self.seen), f"layer {self.layer_idx}")
        widths = with_exact_ends(widths.to(self.device), self.config)
        table = kept_table(self.table, self.pending, widths, self.config, self._shard_of())
        self._fit(table, self.seen)
        self._interrupt()
        self._drop_pending()
        self.table = table
        self.evicted |= bool((widths == 0).any())
        self.holds = False
        self._note_evictions()

    def _fit(self, table: PageTable, seen: int) -> None:
        """Let a table of `seen` columns that is to replace this one keep to the budget; its statistics begin anew."""
        if self.schedule is not None:
            self.schedule.prepare(table)
            self.schedule.enforce(table, self.heads // table.pool.keys.shape[0], seen)

    def _note_evictions(self) -> None:
        self.evicted |= self.schedule is not None and self.schedule.pages_evicted > 0

    def held(self) -> torch.Tensor:
        """Return `(B, H, T)` bool, which columns hold a token of a KV head: neither padding nor evicted."""
        if self.table is None:
            return torch.zeros((0, 0, 0), dtype=torch.bool)
        new = 0 if self.pending is None else self.pending.tokens
        stored = (
            self.table.held(self.seen - new).view(self.batch, self.lanes, self.seen - new).expand(-1, self.heads, -1)
        )
        if self.pending is None:
            return stored.clone()
        fresh = torch.ones((self.batch, self.heads, new), dtype=torch.bool, device=self.device)
        if self.pending.valid is not None:
            fresh &= self.pending.valid[:, None]
        return torch.cat([stored, fresh], dim=2)

    def packed_pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pages of what is kept or packed: they stay as they are, or go as a whole.

        Returns
        -------
        tuple of torch.Tensor
            `(n,)` int64 sequences, `(n, H, P)` int64 columns of the page's tokens in each KV head, -1 where it has
            none, and `(n,)` int64 bytes. Pages that several sequences share come once for each.
        """
        rows, columns, sizes = [], [], []
        size = self.config.page_size
        for name, pool in [] if self.table is None else self.table.pages.sealed.items():
            assert self.table is not None
            for row, sequence in enumerate(self.table.rows):
                pages = sequence.pages(name)
                positions = pool.positions[pool.index(pages)].long()
                by_head = positions.new_full((len(pages), self.heads, size), -1)
                head = slice(None) if self.lanes == 1 else slice(row % self.lanes, row % self.lanes + 1)
                by_head[:, head] = positions[:, None]
                rows.append(torch.full((len(pages),), row // self.lanes, device=positions.device))
                columns.append(by_head)
                # With its positions, its entry in the table, and what the host knows of it.
                each = pool.page_bytes + 4 * size + 8 + pool.host_bytes // max(1, pool.capacity)
                sizes.append(torch.full((len(pages),), each, device=positions.device))
        if not rows:
            empty = torch.zeros(0, dtype=torch.int64, device=getattr(self, "device", None))
            return empty, empty.new_zeros((0, 1, size)), empty
        return torch.cat(rows), torch.cat(columns), torch.cat(sizes)

    def padding(self) -> list[int]:
        """Return how many columns of each row are padding."""
        padding = self._padding_with_pending()
        return [0] * self.batch if padding is None else padding.tolist()

    def _padding_with_pending(self) -> torch.Tensor | None:
        if self.pending is None or self.pending.valid is None:
            return self._padding
        new = (~self.pending.valid).sum(dim=1)
        return new if self._padding is None else self._padding + new

    def settle_marks(self) -> None:
        """Evict what kvpress's head-wise presses have only marked on the attention module."""
        marks = None if self.attachment is None else self.attachment.take_marks(self)
        if marks is None or self.table is None:
            return
        if self._padding_with_pending() is not None:
            raise ValueError(
                f"layer {self.layer_idx}: a press has marked tokens of rows that are padded, and has taken padding for "
                "tokens. Wrap it: pikv_hf.presses.RowwisePress(press)"
            )
        kept = torch.ones((self.batch, self.heads, self.seen), dtype=torch.bool, device=self.device)
        rows, heads, columns = (torch.as_tensor(part, device=self.device) for part in marks)
        if columns.numel() and int(columns.max()) >= self.seen:
            raise ValueError(
                f"layer {self.layer_idx}: a press marked token {int(columns.max())}, but the layer has {self.seen}"
            )
        kept[rows, heads, columns] = False
        self.keep(kept)

    # Shortening

    def may_return(self) -> None:
        """Be ready to be cut back to the present length exactly, whatever gets packed after it.

        kvpress's pipeline asks each layer's length before a question and cuts the answer off afterwards.
        """
        self._returns = True

    def _remember(self) -> None:
        if self._returns and self.table is not None:
            pages = self.table.pages
            used = {name for name, pool in pages.sealed.items() if pool.refcount.any()}
            # It would hold on to what a budget in bytes has to get rid of.
            free = pages.plain.allowance is None
            self._checkpoint = (self.seen, self.table.fork(), used) if pages.seals and free else None
        self._returns = False

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length`; see :func:`cropped_length`.

        Raises
        ------
        ValueError
            Where K/V were assigned from outside and the length reaches into them: their positions are not known.
        """
        self.truncate(self.column_of(cropped_length(self.positions_seen, max_length)))

    def column_of(self, length: int) -> int:
        """Return the columns that remain of the model's first `length` positions."""
        if length >= self.positions_seen or not self.dropped or length >= self._assigned + self.dropped:
            return max(0, length - self.dropped)
        raise ValueError(
            f"layer {self.layer_idx}: cannot crop to {length} positions: of the first {self._assigned + self.dropped}, "
            f"{self._assigned} tokens were assigned from outside, and which ones is not known"
        )

    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        if length >= self.seen or self.table is None:
            return
        if self.pending is not None and length <= self.seen - self.pending.tokens:
            self.pending = None
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None and checkpoint[0] == length:
            _, self.table, pools = checkpoint
            self.pending = None
            self.table.pages.forget_pools(pools)
        else:
            self.settle()
            table = self.table
            self._with_room(lambda: table.crop(length))
        self.seen = length
        self._assigned = min(self._assigned, length)
        self._interrupt()

    # Changing rows

    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`. No token is copied."""
        if self.table is None:
            return
        self.settle_marks()
        lanes = range(self.lanes)
        if self.schedule is not None:
            self.schedule.select(self.table, indices, self.lanes)
        self.table.select([row * self.lanes + lane for row in indices for lane in lanes])
        self._slots = self._checkpoint = None
        self._handed = {}
        if self.pending is not None:
            self.pending = self.pending.select(torch.as_tensor(list(indices), device=self.device))
        if self._padding is not None:
            self._padding = self._padding[list(indices)]
        self._enforce()

    def reset(self) -> None:
        """Forget everything and return the memory."""
        self._clear()

    def _copy_to(self, twin: Any) -> None:
        """Give another layer this one's tokens; both share all pages until either writes to them."""
        self.settle()
        twin.tiers = self.tiers
        if self.table is not None:
            twin.table, twin.heads = self.table.fork(), self.heads
            twin.dtype, twin.device = self.dtype, self.device
        if self.schedule is not None:
            twin.schedule = self.schedule.fork()
            if twin.table is not None:
                twin.schedule.prepare(twin.table)
        for name in ("seen", "dropped", "_assigned", "_padding", "evicted", "is_initialized", "vetted"):
            setattr(twin, name, getattr(self, name))
