"""The tokens of one attention layer: stored and waiting, in one part or in several."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from ..common.kv import KV
from ..config import PiKVConfig
from ..distributed.device_layout import PartLayout
from ..distributed.process_exchange import leaves_others
from ..page_table.cropping import crop
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import ShardOf
from ..pages.page_pool import NoRoomError
from ..pages.pool_id import PoolId
from ..pages.tokens import TokenBatch
from ..routing.policies import PageRouter, make_routing
from ..scheduling.page_scheduler import PageScheduler
from ..sharding.placement import balanced_placement, expert_placement, hash_placement
from ..sharding.shard_map import ShardMap
from ..tiers.tier_limits import LayerTiers, Tiers
from .input_checks import KVFormat
from .kv_assignment import HandedOut
from .layer_part import LayerPart
from .layer_state import LayerState
from .page_migration import level
from .pending_tokens import PendingTokens

if TYPE_CHECKING:
    from ..integration.attachment import Attachment


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
    layout : PartLayout, optional
        Where its parts are; by default one, on the layer's own device.

    Attributes
    ----------
    parts : list of LayerPart
        Those of this process, with what is stored. The first is on the layer's own device.
    shard_map : ShardMap or None
        Which part has which shard, where there are several.
    pending : PendingTokens or None
        New tokens that wait for the layer's router, or for a press.
    state : LayerState
        What it knows of its tokens, as a fork copies it and a file holds it.
    leads : bool
        Whether it is the cache's first, in which processes make sure that they have the same tokens.
    awaits_press : bool
        Whether a press will decide at the end of the call what is kept; until then nothing is packed.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        layer_idx: int,
        config: PiKVConfig,
        attachment: "Attachment | None" = None,
        layout: PartLayout | None = None,
    ) -> None:
        self.layer_idx = layer_idx
        self.config = config
        self.attachment = attachment
        self.layout = PartLayout() if layout is None else layout
        self.has_expert_router = (
            attachment is not None and config.placement != "hash" and layer_idx in attachment.expert_routers
        )
        self.leads = False
        self.parts = [LayerPart(location, page_router=self._new_page_router()) for location in self.layout.locations]
        if config.tiers is not None:
            # The cache replaces them by parts of its own, so that its layers share limits and counters.
            tiers = Tiers(config, self.layout.parts)
            for part in self.parts:
                part.tiers = tiers.layer(layer_idx, part.location.number)
        self._clear()

    def _new_page_router(self) -> PageRouter | None:
        policy = make_routing(self.config)
        return None if policy is None else PageRouter(policy, self.config.sink_tokens, self.config.recent_window)

    def _clear(self) -> None:
        for part in self.parts:
            part.table = part.slots = None
        self.shard_map: ShardMap | None = None
        self.pending: PendingTokens | None = None
        self.state = LayerState()
        self.awaits_press = False
        self._handed: dict[str, HandedOut] = {}
        self._staged: torch.Tensor | None = None
        self._returns = False
        # Of a prompt that the processes have not agreed on yet.
        self.prompt_mark: torch.Tensor | None = None
        self._checkpoint: tuple[int, list[tuple[PageTable, set[PoolId]]]] | None = None

    # The first part, which is all there is on one device

    @property
    def table(self) -> PageTable | None:
        """What the first part stores."""
        return self.parts[0].table

    @table.setter
    def table(self, table: PageTable | None) -> None:
        self.parts[0].table = table

    @property
    def scheduler(self) -> PageScheduler | None:
        """What evicts the first part's pages."""
        return self.parts[0].scheduler

    @scheduler.setter
    def scheduler(self, scheduler: PageScheduler | None) -> None:
        self.parts[0].scheduler = scheduler

    @property
    def page_router(self) -> PageRouter | None:
        """What chooses the pages that steps read of the first part."""
        return self.parts[0].page_router

    @page_router.setter
    def page_router(self, router: PageRouter | None) -> None:
        self.parts[0].page_router = router

    @property
    def tiers(self) -> LayerTiers | None:
        """Where the first part's full pages may go."""
        return self.parts[0].tiers

    @tiers.setter
    def tiers(self, tiers: LayerTiers | None) -> None:
        self.parts[0].tiers = tiers

    def tables(self) -> list[PageTable]:
        """Return what the parts of this process store."""
        return [part.table for part in self.parts if part.table is not None]

    def shard_of(self) -> ShardOf:
        """Return the map from positions and experts of tokens to shards."""
        if self.has_expert_router and self.attachment is not None:
            config, experts = self.config, self.attachment.expert_routers[self.layer_idx].num_experts
            if config.placement == "balanced":
                loads = np.ones(experts) if self.state.expert_loads is None else self.state.expert_loads
                return balanced_placement(
                    loads, config.num_shards, config.page_size, self.layer_idx, config.hot_replicas
                )
            return expert_placement(experts, config.num_shards, self.layer_idx)
        return hash_placement(self.config.page_size, self.config.num_shards)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pools and page tables for K/V of these shapes."""
        batch, self.heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.layout.parts > 1 and self.shard_map is None:
            per_shard = self.config.budget_scope == "shard"
            self.shard_map = ShardMap(
                self.config.num_shards, list(self.layout.weights), self.config.page_size, whole=per_shard
            )
        shape, shard_of = (batch, self.heads, dim, value_states.shape[-1]), self.shard_of()
        tables = [
            part.begin(self.config, shape, self.dtype, self.device, shard_of, self.shard_map) for part in self.parts
        ]
        self._replace_tables(tables)
        self.state.is_initialized = True

    def _replace_tables(self, tables: list[PageTable]) -> None:
        for part, table in zip(self.parts, tables, strict=True):
            part.table, part.slots = table, None

    @property
    def lanes(self) -> int:
        """Rows of the table per sequence: 1, or one per KV head once heads keep different tokens."""
        return 1 if self.table is None else self.heads // self.table.plain.keys.shape[0]

    @property
    def batch(self) -> int:
        """Sequences, 0 before the first update."""
        return 0 if self.table is None else len(self.table.rows) // self.lanes

    @property
    def seen(self) -> int:
        """Columns, evicted ones and padding included."""
        return self.state.seen

    @property
    def dropped(self) -> int:
        """Positions that the model has seen beyond the columns."""
        return self.state.dropped

    @property
    def evicted(self) -> bool:
        """Whether some columns hold no token although they are not padding."""
        return self.state.evicted

    @property
    def vetted(self) -> bool:
        """Whether every stored token is known to be real."""
        return self.state.vetted

    @property
    def is_initialized(self) -> bool:
        """Whether pools and page tables exist."""
        return self.state.is_initialized

    @property
    def positions_seen(self) -> int:
        """Positions that the model has seen, padding included."""
        return self.state.positions_seen

    def _kv_format(self) -> KVFormat | None:
        if self.table is None:
            return None
        pool = self.table.plain
        return (self.batch, self.heads, pool.keys.shape[3], pool.values.shape[3]), self.dtype, self.device

    def _by_lane(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `(B, H, Q, D)` as the table's rows have it, `(B * H, 1, Q, D)` if these are lanes."""
        return tokens if self.lanes == 1 else tokens.reshape(-1, 1, *tokens.shape[2:])

    def _row_by_lane(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(self.lanes, dim=0)

    # Storing

    def settle_marks(self) -> None:
        """Evict what kvpress's head-wise presses have only marked on the attention module."""
        raise NotImplementedError

    @leaves_others
    def settle(self) -> None:
        """Store what is pending, where no router is awaited, and move what has left the window to its shards."""
        if self._staged is not None:
            staged, self._staged = self._staged, None
            raise RuntimeError(
                f"layer {self.layer_idx}: keys {tuple(staged.shape)} were assigned without values; assign both"
            )
        self.settle_marks()
        self.awaits_press = False
        if self.pending is not None:
            experts = self.pending.experts
            if experts is None:
                experts = torch.full((self.batch, self.pending.tokens), -1, device=self.device)
            self._place(experts)
        if self.table is not None:
            self._flush()

    def _flush(self) -> None:
        """Move what has left the window to its shards, and see to it that parts and budgets are kept."""
        moved = any(table.is_ripe for table in self.tables())
        if moved:
            self._in_all_parts(lambda part, table: table.flush())
        for part in self.parts:
            part.enforce(self.lanes, self.state.seen)
        self._note_evictions()
        if moved:
            self._balance()

    def _balance(self) -> None:
        """See to it that parts are about as full as they should be."""
        if self.shard_map is not None:
            self.shard_map.divide_if_skewed()
            level(self.parts, self.shard_map)

    def _in_all_parts(self, work: Callable[[LayerPart, PageTable], Any]) -> None:
        """Do what may need new pages in all parts, or in none: what has left the window of one is in another.

        Raises
        ------
        BudgetError
            If the budget leaves no room for them, and nothing more can be evicted.
        """
        if len(self.parts) == 1 and self.shard_map is None:
            (part,), (table,) = self.parts, self.tables()
            part.with_room(self.state.seen, lambda: work(part, table))
            return
        while True:
            at = self.parts[0]
            try:
                with ExitStack() as stack:
                    for table in self.tables():
                        stack.enter_context(table.transaction())
                    if self.shard_map is not None:
                        stack.enter_context(self.shard_map.transaction())
                    for at, table in zip(self.parts, self.tables(), strict=True):
                        work(at, table)
                return
            except NoRoomError as error:
                at.make_room(self.state.seen, error)

    def _place(self, experts: torch.Tensor) -> None:
        assert self.table is not None
        assert self.pending is not None
        new, start = self.pending, self.state.seen - self.pending.tokens
        positions = torch.arange(start, self.state.seen, dtype=torch.int32, device=self.device)
        by_lane = self._row_by_lane(experts).to(torch.int16)
        tokens = TokenBatch(self._by_lane(new.keys), self._by_lane(new.values), positions, by_lane)
        valid = None if new.valid is None else self._row_by_lane(new.valid)
        masses = None
        if new.masses is not None:
            masses = new.masses.mean(dim=1) if self.lanes == 1 else new.masses.flatten(0, 1)
        self._measure(positions, experts, new.valid)
        try:
            for first in range(0, new.tokens, piece := self._piece(new)):
                self._store(tokens, valid, masses, slice(first, first + piece))
        except BaseException:
            for table in self.tables():
                crop(table, start)
            raise
        self._note_evictions()
        self._drop_pending()
        self._balance()

    def _measure(self, positions: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Group experts into shards, and divide these among the parts, by what a prompt brings of each.

        Groups are those of the first prompt. `positions` are `(Q,)`, `experts` and `valid` `(B, Q)`.
        """
        assert self.table is not None
        balances = self.config.placement == "balanced" and self.has_expert_router and self.state.expert_loads is None
        divides = self.shard_map is not None and self.shard_map.is_to_plan(positions.shape[0])
        if not balances and not divides:
            return
        every = positions.expand(self.batch, -1)
        if valid is not None:
            every, experts = every[valid], experts[valid]
        every, experts = every.flatten(), experts.flatten()
        if balances and len(experts) and self.attachment is not None:
            known = self.attachment.expert_routers[self.layer_idx].num_experts
            self.state.expert_loads = np.bincount(experts.clamp_min(0).cpu().numpy(), minlength=known)
            for table in self.tables():
                table.writer.follow(self.shard_of())
        if divides and self.shard_map is not None:
            shards = self.shard_of()(every, experts.to(torch.int16)).cpu().numpy()
            # Rows that have been the same so far may go on to be.
            rows = len({id(row) for row in self.table.rows}) / len(self.table.rows)
            self.shard_map.plan(np.bincount(shards, minlength=self.shard_map.num_shards) * rows)

    def _piece(self, new: PendingTokens) -> int:
        """Return how many of the new tokens to store before pages may have to go."""
        per_token = (new.keys[:, :, :1].numel() + new.values[:, :, :1].numel()) * new.keys.element_size()
        sizes = [
            part.scheduler.piece(self.state.seen, self.config.page_size, per_token)
            for part in self.parts
            if part.scheduler is not None
        ]
        return min(max(1, new.tokens), *sizes, 1 << 60)

    def _store(
        self,
        tokens: TokenBatch,
        valid: torch.Tensor | None,
        masses: torch.Tensor | None,
        part: slice,
    ) -> None:
        """Store some of the new tokens, of all rows."""
        assert self.table is not None
        some = tokens[part]
        real = None if valid is None else valid[:, part]
        credit = None if masses is None else masses[:, part]
        # Rows are alike in all parts or in none.
        leaders = self.table.identical_rows(some, real)
        self._in_all_parts(lambda part, _: part.store(some, real, leaders))
        for each in self.parts:
            if credit is not None:
                each.credit(credit, int(some.positions[0]))
            each.enforce(self.lanes, self.state.seen)

    def _note_evictions(self) -> None:
        self.state.evicted |= any(
            part.scheduler is not None and part.scheduler.pages_evicted > 0 for part in self.parts
        )

    def _drop_pending(self) -> None:
        """Forget what was pending, once it is stored."""
        if self.pending is not None:
            self.state.vetted &= self.pending.vetted
            self.state.padding = self._padding_with_pending()
            self.pending = None

    def _interrupt(self) -> None:
        """The tokens of the last call are no longer what the router will speak of."""
        for part in self.parts:
            part.slots = None
        self._checkpoint = None
        self._handed = {}
        if self.attachment is not None:
            self.attachment.forget(self)

    # Reading

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all K/V by column, `(B, H, T, D)` and `(B, H, T, Dv)`; zeros for padding and what was evicted."""
        return self._dense(KV.KEYS), self._dense(KV.VALUES)

    def _dense(self, which: KV) -> torch.Tensor:
        assert self.table is not None
        new = None
        if self.pending is not None:
            new = self.pending.keys if which is KV.KEYS else self.pending.values
            if self.pending.tokens == self.state.seen:
                return new
        stored = self.state.seen - (0 if self.pending is None else self.pending.tokens)
        # Every token is in one part, and zero in the others.
        past = self.table.view.dense_part(stored, which)
        for table in self.tables()[1:]:
            past += table.view.dense_part(stored, which).to(past.device)
        if self.layout.exchange is not None:
            past = self.layout.exchange.total(past)
        past = past.reshape(self.batch, self.heads, stored, past.shape[-1])
        return past if new is None else torch.cat([past, new], dim=2)

    def stored_mask(self) -> torch.Tensor:
        """Return `(B, H, T)` bool, which columns hold a token of a KV head: neither padding nor evicted."""
        if self.table is None:
            return torch.zeros((0, 0, 0), dtype=torch.bool)
        new = 0 if self.pending is None else self.pending.tokens
        stored = self.table.view.stored_mask(self.state.seen - new)
        for table in self.tables()[1:]:
            stored |= table.view.stored_mask(self.state.seen - new).to(stored.device)
        if self.layout.exchange is not None:
            stored = self.layout.exchange.total(stored)
        stored = stored.view(self.batch, self.lanes, self.state.seen - new).expand(-1, self.heads, -1)
        if self.pending is None:
            return stored.clone()
        return torch.cat([stored, self._fresh()], dim=2)

    def _fresh(self) -> torch.Tensor:
        """Return `(B, H, Q)` bool, which of the pending columns hold a token."""
        assert self.pending is not None
        fresh = torch.ones((self.batch, self.heads, self.pending.tokens), dtype=torch.bool, device=self.device)
        if self.pending.valid is not None:
            fresh &= self.pending.valid[:, None]
        return fresh

    def storages(self, part: int | None = None) -> list[torch.Tensor]:
        """Return the tensors that hold the memory of one of the parts, or of all; what is pending is the first's."""
        held = []
        for each in self.parts if part is None else [self.parts[part]]:
            held += [] if each.table is None else each.table.pools.tensors()
            held += [] if each.scheduler is None else each.scheduler.tensors()
        return held if self.pending is None or part else [*held, self.pending.keys, self.pending.values]

    def padding(self) -> list[int]:
        """Return how many columns of each row are padding."""
        padding = self._padding_with_pending()
        return [0] * self.batch if padding is None else padding.tolist()

    def _padding_with_pending(self) -> torch.Tensor | None:
        if self.pending is None or self.pending.valid is None:
            return self.state.padding
        new = (~self.pending.valid).sum(dim=1)
        return new if self.state.padding is None else self.state.padding + new
