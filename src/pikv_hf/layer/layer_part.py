"""The part of a layer that one device, or one process, has: a page table, and what evicts and chooses its pages."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from ..common.tensors import to_device
from ..config import PiKVConfig
from ..distributed.device_layout import PartLayout, PartLocation
from ..page_table.compaction import ExactTokens, config_of_lanes
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import SequenceWriter, ShardOf
from ..pages.plain_pool import PlainPool
from ..pages.pool_growth import NoRoomError
from ..pages.tokens import TokenBatch
from ..routing.page_router import PageRouter, make_page_router
from ..scheduling.page_scheduler import PageScheduler
from ..sharding.shard_map import ShardMap
from ..tiers.tier_limits import LayerTiers, Tiers
from .input_checks import KVFormat
from .pending_tokens import PendingTokens
from .table_rebuild import TableRebuild

_Result = TypeVar("_Result")


@dataclasses.dataclass(slots=True)
class LayerPart:
    """A part of a layer: a page table over pages of its own.

    Every part has the tokens of the window, so that a token that leaves it is already where its shard is; what then
    belongs to other parts, a part lets go. Only the window of part 0 is read.

    Attributes
    ----------
    location : PartLocation
        Its number, and its device.
    scheduler : PageScheduler or None
        Evicts what exceeds what this part has of a budget.
    page_router : PageRouter or None
        Chooses what decoding steps read of it.
    tiers : LayerTiers or None
        Where its full pages may go.
    latent : bool
        Whether the layer's only KV head is of latents, with rotary keys as values.
    table : PageTable or None
        What is stored. Its rows are sequences, or lanes of one KV head once heads keep different tokens.
    """

    location: PartLocation
    scheduler: PageScheduler | None = None
    page_router: PageRouter | None = None
    tiers: LayerTiers | None = None
    latent: bool = False
    table: PageTable | None = None

    @property
    def device(self) -> torch.device:
        """Where the pages are, once there are any."""
        assert self.table is not None
        return self.table.plain.device

    def begin(
        self, kv_format: KVFormat, config: PiKVConfig, shard_of: ShardOf, shard_map: ShardMap | None
    ) -> PageTable:
        """Return an empty table for K/V of a layer; the format's device is that of the layer's attention."""
        (batch, heads, dim, value_dim), dtype, home = kv_format
        per_head = self.scheduler is not None and self.scheduler.policy.per_head
        device = home if self.location.device is None else self.location.device
        pool = PlainPool(1 if per_head else heads, dim, value_dim, config.page_size, dtype, device)
        pool.rotary_values = self.latent and heads == 1
        pages = LayerPools(pool, config_of_lanes(config) if per_head else config, self.tiers)
        writer = SequenceWriter(pages, config.num_shards, config.recent_window, config.sink_tokens, shard_of)
        self.assign_shards(writer, shard_map)
        table = PageTable(writer, batch * heads if per_head else batch)
        if self.scheduler is not None:
            self.scheduler.prepare(table)
        if self.page_router is not None:
            self.page_router.policy.prepare(pages)
        return table

    def assign_shards(self, writer: SequenceWriter, shard_map: ShardMap | None) -> None:
        """Have a writer of this part leave to other parts what the shard map gives them."""
        # What leaves the window does so in all parts of a process: the first of them counts it.
        writer.write_part(shard_map, self.location.number, counts=self.location.device is None)

    # Storing

    def with_room(self, seen: int, work: Callable[[], _Result]) -> _Result:
        """Do what may need new pages, within the budget, after `seen` positions of the layer."""
        if self.scheduler is None:
            return work()
        assert self.table is not None
        return self.scheduler.with_room(self.table, seen, work)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of the tokens, and of what the scheduler counts, if the block raises."""
        table, scheduler = self.table, copy.copy(self.scheduler)
        try:
            with nullcontext() if table is None else table.transaction():
                yield
        except BaseException:
            self.table = table
            if self.scheduler is not None:
                vars(self.scheduler).update(vars(scheduler))
            raise

    def enforce(self, lanes: int, seen: int, headroom: int = 0) -> None:
        """Evict what exceeds a budget in tokens, if pages have changed hands since this was last done."""
        if self.scheduler is None or self.table is None or not self.table.is_at_page_end:
            return
        # Layers that decide together have made room.
        if self.scheduler.shared is None or not headroom:
            self.scheduler.enforce(self.table, lanes, seen, headroom)

    def make_room(self, seen: int, error: NoRoomError) -> None:
        """Evict what a pool of this part needs to go on; see :meth:`PageScheduler.make_room`."""
        assert self.scheduler is not None
        assert self.table is not None
        self.scheduler.make_room(self.table, seen, error)

    def append_batch(
        self, tokens: TokenBatch, valid: torch.Tensor | None, leaders: list[int], masses: torch.Tensor | None
    ) -> None:
        """Store new tokens: those of the window, and those that go straight to shards of this part.

        Parameters
        ----------
        tokens : TokenBatch
            Q tokens of each of the R rows of the table.
        valid : torch.Tensor, optional
            `(R, Q)` bool, False for padding.
        leaders : list of int
            See :meth:`PageTable.append`.
        masses : torch.Tensor, optional
            `(R, Q)`, how the tokens were attended to in their own call.
        """
        assert self.table is not None
        self.table.append(tokens, valid, leaders)
        if self.scheduler is not None and masses is not None:
            self.scheduler.credit(self.table, masses.to(self.device), int(tokens.positions[0]))

    def append(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Write one decoded token per row, `(R, H', 1, D)` and `(R, H', 1, Dv)`, into the window."""
        assert self.table is not None
        if keys.device != (device := self.table.plain.device):
            keys, values = to_device(keys, device), to_device(values, device)
        self.table.append_newest(keys, values, seen)

    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts `(R,)` of the tokens of :meth:`append`."""
        if (table := self.table) is not None:
            here = experts.device == table.plain.device
            table.record_experts(experts if here else to_device(experts, table.plain.device))

    # Replacing the table

    def fit(self, table: PageTable, lanes: int, seen: int) -> None:
        """Let a table of `seen` columns that is to replace this part's keep to the budget; statistics begin anew."""
        if self.page_router is not None:
            # What it keeps of pages counts.
            self.page_router.policy.prepare(table.pools)
        if self.scheduler is not None:
            self.scheduler.prepare(table)
            self.scheduler.enforce(table, lanes, seen)

    def kept_table(self, pending: PendingTokens | None, widths: torch.Tensor, rebuild: TableRebuild) -> PageTable:
        """Return a table of what is kept of this part and of `pending`; see :meth:`TableRebuild.kept_table`."""
        assert self.table is not None
        new = None if pending is None else pending.to(self.device)
        table = rebuild.kept_table(self.table, new, widths.to(self.device))
        table.pools.set_rotary_values(self.table.plain.rotary_values)
        self.assign_shards(table.writer, rebuild.shard_map)
        return table

    def assigned_table(self, tokens: ExactTokens, rebuild: TableRebuild) -> PageTable:
        """Return a table of K/V from outside; see :meth:`TableRebuild.assigned_table`."""
        here = ExactTokens(*(tensor.to(self.device) for tensor in (tokens.keys, tokens.values, tokens.stored)))
        table = rebuild.assigned_table(here, self.tiers)
        table.pools.set_rotary_values(self.latent and tokens.keys.shape[1] == 1)
        self.assign_shards(table.writer, rebuild.shard_map)
        return table

    # Changing rows

    def select(self, indices: Sequence[int], lanes: int) -> None:
        """Replace the sequences by those at `indices`."""
        assert self.table is not None
        if self.scheduler is not None:
            self.scheduler.select(self.table, indices, lanes)
        self.table.select_rows([row * lanes + lane for row in indices for lane in range(lanes)])

    def fork(self, config: PiKVConfig) -> "LayerPart":
        """Return a part with the same tokens; both share all pages until either writes to them."""
        table = None if self.table is None else self.table.fork()
        scheduler = None if self.scheduler is None else self.scheduler.fork()
        if scheduler is not None and table is not None:
            scheduler.prepare(table)
        return LayerPart(self.location, scheduler, make_page_router(config), self.tiers, self.latent, table)


def make_parts(
    layer_idx: int,
    config: PiKVConfig,
    layout: PartLayout,
    schedulers: Sequence[PageScheduler | None] | None = None,
    tiers: Tiers | None = None,
    latent: bool = False,
) -> list[LayerPart]:
    """Return the parts of a layer in this process, without tokens.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Routing, and the tiers of a layer alone.
    layout : PartLayout
        Where they are.
    schedulers : sequence of PageScheduler or None, optional
        What evicts their pages, part by part; nothing by default.
    tiers : Tiers, optional
        Those of the cache, whose layers share limits and counters; by default the layer has some of its own.
    latent : bool
        Whether the layer's attention is latent.
    """
    if tiers is None and config.tiers is not None:
        tiers = Tiers(config, layout.parts)
    return [
        LayerPart(
            location,
            None if schedulers is None else schedulers[index],
            make_page_router(config),
            None if tiers is None else tiers.layer(layer_idx, location.number),
            latent,
        )
        for index, location in enumerate(layout.locations)
    ]
