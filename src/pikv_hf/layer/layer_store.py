"""The tokens of one attention layer: stored in one part or in several, or pending until it is known where they go."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from ..config import PiKVConfig
from ..distributed.device_layout import PartLayout
from ..page_table.cropping import crop
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import ShardOf
from ..pages.pool_growth import NoRoomError
from ..pages.tokens import TokenBatch
from ..sharding.shard_map import ShardMap
from .cache_lock import new_cache_lock
from .input_checks import KVFormat
from .layer_part import LayerPart
from .layer_placement import layer_placement
from .layer_state import LayerState
from .mask_columns import joined, trimmed
from .page_migration import migrate_pages
from .pending_tokens import PendingTokens, rows_by_lane, tokens_by_lane
from .table_rebuild import part_of_tokens


class LayerStore:
    """Stores tokens in the parts of a layer, by *column*: the position of a token within the layer.

    Columns are the model's own positions until K/V are assigned from outside, as kvpress does: an assignment numbers
    its tokens anew, and the state remembers how many positions the model has seen beyond them.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Page size, window, shards, codecs.
    layout : PartLayout
        Where the parts of the layer are, those of other processes included.
    parts : list of LayerPart
        Those of this process. The first is on the device of the layer's attention.
    num_experts : int
        What the layer's expert router chooses among, 0 where tokens are placed by position.
    indexer_dim : int
        Channels of the keys of an indexer, which lie behind the values of the heads; 0 without one.

    Attributes
    ----------
    state : LayerState
        What is known of the tokens, as a fork copies it and a file holds it.
    pending : PendingTokens or None
        The newest tokens, while they wait for the expert router or for a press.
    shard_map : ShardMap or None
        Which part has which shard, where there are several.
    lock : context manager
        Of the cache and its forks, whose pages these are too; see :mod:`~pikv_hf.layer.cache_lock`.
    heads, dtype, device
        KV heads, and dtype and device of the layer's K/V, from the first tokens on.
    """

    heads: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        layer_idx: int,
        config: PiKVConfig,
        layout: PartLayout,
        parts: list[LayerPart],
        num_experts: int,
        indexer_dim: int = 0,
    ) -> None:
        self.layer_idx, self.config, self.layout = layer_idx, config, layout
        self.parts, self.num_experts, self.indexer_dim = parts, num_experts, indexer_dim
        self.state = LayerState()
        self.pending: PendingTokens | None = None
        self.shard_map: ShardMap | None = None
        self.lock = new_cache_lock()
        # With the table, its rows and the heads that it is of.
        self._known_format: tuple[weakref.ref[PageTable], int, int, KVFormat] | None = None

    def clear(self) -> None:
        """Forget everything and return the memory."""
        for part in self.parts:
            part.table = None
            if part.scheduler is not None:
                part.scheduler.forget()
        self.state, self.pending, self.shard_map = LayerState(), None, None

    def begin_if_empty(self, kv_format: KVFormat) -> None:
        """Create pools and page tables unless there are some of this format, or with tokens."""
        if not self.state.seen and (self.table is None or self._format_of(self.table) != kv_format):
            self.begin(kv_format)

    def begin(self, kv_format: KVFormat) -> None:
        """Create the empty pools and page tables for K/V of this format."""
        shard_map, shard_of = self.shard_map, self.shard_of()
        if self.layout.parts > 1 and shard_map is None:
            weights, whole = list(self.layout.weights), self.config.budget_scope == "shard"
            shard_map = ShardMap(self.config.num_shards, weights, self.config.page_size, whole=whole)
        # A part whose tiers are too small for a page raises.
        stored = kv_format.with_indexer(self.indexer_dim)
        tables = [part.begin(stored, self.config, shard_of, shard_map) for part in self.parts]
        (_, self.heads, _, _), self.dtype, self.device = kv_format
        self.shard_map = shard_map
        self.replace_tables(tables)
        self.state.is_initialized = True

    def go_on_from(self, other: "LayerStore") -> None:
        """Take over what another store of the same parts knows of its tokens, none of which are pending."""
        if other.table is not None:
            self.heads, self.dtype, self.device = other.heads, other.dtype, other.device
        self.state, self.shard_map, self.lock = other.state.copy(), other.shard_map, other.lock

    @property
    def table(self) -> PageTable | None:
        """The page table of the first part, None before the first tokens."""
        return self.parts[0].table

    def tables(self) -> list[PageTable]:
        """Return the page tables of the parts of this process."""
        return [part.table for part in self.parts if part.table is not None]

    def replace_tables(self, tables: list[PageTable]) -> None:
        """Give each part another page table."""
        for part, table in zip(self.parts, tables, strict=True):
            part.table = table

    @property
    def lanes(self) -> int:
        """Rows of the table per sequence: 1, or one per KV head once heads keep different tokens."""
        table = self.parts[0].table
        return 1 if table is None else self.heads // table.plain.keys.shape[0]

    @property
    def indexer_width(self) -> int:
        """Channels behind those of a head's values for its share of the indexer's keys, once there are pages."""
        return -(-self.indexer_dim // self.heads) if self.indexer_dim else 0

    @property
    def awaits_indexer(self) -> bool:
        """Whether the newest tokens have K/V, but no indexer keys yet."""
        return self.pending is not None and self.pending.awaits_indexer

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first tokens."""
        table = self.parts[0].table
        return 0 if table is None else len(table.rows) * table.plain.keys.shape[0] // self.heads

    @property
    def stored(self) -> int:
        """Columns of the tokens that are not pending."""
        return self.state.seen - (0 if self.pending is None else self.pending.tokens)

    def kv_format(self) -> KVFormat | None:
        """Return what new K/V must be like, None while the layer is empty."""
        table, known = self.parts[0].table, self._known_format
        if table is None or not self.state.seen:
            return None
        # Asked for in every step; it changes with tables, rows and heads alone.
        if known is None or known[0]() is not table or known[1] != len(table.rows) or known[2] != self.heads:
            known = self._known_format = weakref.ref(table), len(table.rows), self.heads, self._format_of(table)
        return known[3]

    def _format_of(self, table: PageTable) -> KVFormat:
        pool = table.plain
        shape = self.batch, self.heads, pool.keys.shape[3], pool.values.shape[3] - self.indexer_width
        return KVFormat(shape, self.dtype, self.device)

    def shard_of(self) -> ShardOf:
        """Return the function from positions and experts of tokens to their shards."""
        return layer_placement(self.config, self.layer_idx, self.num_experts, self.state.expert_loads)

    def own_tokens(self, kept: torch.Tensor) -> list[torch.Tensor | None]:
        """Return for each part of this process which of the tokens `(B, H, T)` are its own; None for all of them."""
        if self.layout.parts == 1:
            return [None]
        owners = part_of_tokens(kept, self.config.page_size, self.layout.weights)
        return [owners == part.location.number for part in self.parts]

    def _learn_from_prompt(self, positions: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Group experts into shards, and divide these among the parts, by what a prompt brings of each.

        Groups are those of the first prompt. `positions` are `(Q,)`, `experts` and `valid` `(B, Q)`.
        """
        groups = self.config.placement == "balanced" and self.num_experts > 0 and self.state.expert_loads is None
        divides = self.shard_map is not None and self.shard_map.is_to_plan(positions.shape[0])
        if not groups and not divides:
            return
        every = positions.expand(self.batch, -1)
        if valid is not None:
            every, experts = every[valid], experts[valid]
        every, experts = every.flatten(), experts.flatten()
        if groups and len(chosen := experts[experts >= 0]):
            self._group_experts(np.bincount(chosen.cpu().numpy(), minlength=self.num_experts))
        if divides and self.shard_map is not None and self.table is not None:
            shards = self.shard_of()(every, experts.to(torch.int16)).cpu().numpy()
            # Rows that have been the same so far may go on to be.
            rows = len(self.table.sequences()) / len(self.table.rows)
            self.shard_map.plan(np.bincount(shards, minlength=self.shard_map.num_shards) * rows)

    def _group_experts(self, loads: np.ndarray | None) -> None:
        """Have later tokens go to the shards that experts with these loads make."""
        self.state.expert_loads = loads
        for table in self.tables():
            table.writer.set_shard_of(self.shard_of())

    def _balance(self) -> None:
        """Divide shards anew and move pages where parts have become unevenly full."""
        if self.shard_map is not None:
            self.shard_map.divide_if_skewed()
            migrate_pages(self.parts, self.shard_map)

    # Storing

    def release_abandoned(self) -> None:
        """Give back the pages of forks and snapshots that are gone."""
        for table in self.tables():
            pages = table.pools
            gone = bool(pages.abandoned)
            pages.release_abandoned()
            if gone and (limit := pages.plain.growth_limit) is not None and limit() < 0:
                # With a fork its budget is gone, to which free pages may owe their place.
                for pool_id in pages.by_id():
                    pages.compact(pool_id)

    def settle(self) -> None:
        """Store what is pending, and move what has left the window to its shards, within the budget."""
        self.release_abandoned()
        if self.pending is not None:
            experts = self.pending.experts
            if experts is None:
                experts = torch.full((self.batch, self.pending.tokens), -1, device=self.device)
            self.place(experts)
        if self.table is None:
            return
        moved = any(table.is_ripe for table in self.tables())
        if moved:
            self.in_all_parts(lambda part, table: table.flush())
        self.enforce()
        if moved:
            self._balance()
        self.give_back(always=moved)

    def give_back(self, always: bool = True) -> None:
        """Give back the memory of free pages, where these are many; see :meth:`LayerPools.give_back`."""
        for table in self.tables():
            table.pools.give_back(always)

    def place(self, experts: torch.Tensor) -> None:
        """Store the pending tokens, whose primary experts are `(B, Q)`, in all parts or in none."""
        assert self.pending is not None
        self.pending.check_indexed(self.layer_idx)
        new, start, lanes = self.pending, self.stored, self.lanes
        positions = torch.arange(start, self.state.seen, dtype=torch.int32, device=self.device)
        by_lane = rows_by_lane(experts, lanes).to(torch.int16)
        tokens = TokenBatch(tokens_by_lane(new.keys, lanes), tokens_by_lane(new.values, lanes), positions, by_lane)
        valid = None if new.valid is None else rows_by_lane(new.valid, lanes)
        masses = None
        if new.masses is not None:
            masses = new.masses.mean(dim=1) if lanes == 1 else new.masses.flatten(0, 1)
        padding, loads = self.padding_columns(), self.state.expert_loads
        with nullcontext() if self.shard_map is None else self.shard_map.transaction():
            try:
                self._learn_from_prompt(positions, experts, new.valid)
                for first in range(0, new.tokens, piece := self._piece(new)):
                    self._store(tokens, valid, masses, slice(first, first + piece))
            except BaseException:
                # Of several pieces, which a budget asks for, some may be there. What was evicted for them stays so.
                for table in self.tables():
                    crop(table, start)
                self._group_experts(loads)
                raise
        self.note_evictions()
        self.state.padding, self.pending = padding, None
        self._balance()
        self.give_back()

    def _piece(self, new: PendingTokens) -> int:
        """Return how many of the new tokens to store before pages may have to go."""
        per_token = (new.keys[:, :, :1].numel() + new.values[:, :, :1].numel()) * new.keys.element_size()
        schedulers = [part.scheduler for part in self.parts if part.scheduler is not None]
        sizes = [each.piece(self.state.seen, self.config.page_size, per_token) for each in schedulers]
        return min(max(1, new.tokens), *sizes, 1 << 60)

    def _store(self, tokens: TokenBatch, valid: torch.Tensor | None, masses: torch.Tensor | None, piece: slice) -> None:
        """Store some of the new tokens, of all rows."""
        assert self.table is not None
        some = tokens[piece]
        real = None if valid is None else valid[:, piece]
        # Rows are alike in all parts or in none.
        leaders = self.table.identical_rows(some, real)
        own = None if masses is None else masses[:, piece]
        self.in_all_parts(lambda part, _: part.append_batch(some, real, leaders, own))
        for part in self.parts:
            part.enforce(self.lanes, self.state.seen)

    def in_all_parts(self, work: Callable[[LayerPart, PageTable], Any]) -> None:
        """Do what may need new pages in all parts, or in none: what has left the window of one is in another.

        Raises
        ------
        BudgetError
            If the budget leaves no room for them, and nothing more can be evicted.
        """
        while True:
            at = self.parts[0]
            try:
                with self.transaction():
                    for at, table in zip(self.parts, self.tables(), strict=True):
                        work(at, table)
                return
            except NoRoomError as error:
                at.make_room(self.state.seen, error)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of the tokens, stored and pending, and of what is known of them, if the block raises.

        Pages that are let go of within the block are free after it: nothing may be evicted to make room for others.
        """
        state, pending = self.state.copy(), self.pending
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.transaction())
            if self.shard_map is not None:
                stack.enter_context(self.shard_map.transaction())
            try:
                yield
            except BaseException:
                self.state.become(state)
                self.pending = pending
                raise

    def enforce(self) -> None:
        """Evict in every part what exceeds a budget in tokens; where layers share one, they did when tokens came."""
        lanes = self.lanes
        for part in self.parts:
            if part.scheduler is None or part.scheduler.shared is None:
                part.enforce(lanes, self.state.seen)
        self.note_evictions()

    def note_evictions(self) -> None:
        """Note whether a budget has cost tokens: they can be passed over by PiKV's attention alone."""
        for part in self.parts:
            if part.scheduler is not None and part.scheduler.pages_evicted:
                self.state.evicted = True

    def drop_pending(self) -> None:
        """Forget what was pending, once it is stored; its padding is counted."""
        if self.pending is not None:
            self.state.padding = self.padding_columns()
            self.pending = None

    def padding_columns(self) -> np.ndarray | None:
        """Return the padding, pending ones included, as the state has it."""
        if self.pending is None or self.pending.valid is None:
            return self.state.padding
        return joined(self.state.padding, self.stored, self.pending.valid.cpu().numpy())

    @property
    def is_padded(self) -> bool:
        """Whether rows have padding, pending or before."""
        return self.padding_columns() is not None

    def padding(self) -> list[int]:
        """Return how many columns of each row are padding, pending ones included."""
        columns = self.padding_columns()
        return [0] * self.batch if columns is None else columns.sum(axis=1).tolist()

    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`, within a transaction. No token is copied."""
        lanes = self.lanes
        for part in self.parts:
            part.select(indices, lanes)
        if self.pending is not None:
            self.pending = self.pending.select(torch.as_tensor(list(indices), device=self.device))
        if self.state.padding is not None:
            self.state.padding = trimmed(self.state.padding[list(indices)])
