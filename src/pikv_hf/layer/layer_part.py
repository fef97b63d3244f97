"""What one device, or one process, holds of a layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..common.tensors import carried
from ..config import PiKVConfig
from ..distributed.device_layout import PartLocation
from ..page_table.compaction import config_of_lanes
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import SequenceWriter, ShardOf
from ..pages.page_pool import NoRoomError
from ..pages.plain_pool import PlainPool
from ..pages.tokens import TokenBatch
from ..routing.policies import PageRouter
from ..scheduling.page_scheduler import PageScheduler
from ..sharding.shard_map import ShardMap
from ..tiers.tier_limits import LayerTiers
from .pending_tokens import PendingTokens
from .table_rebuild import assigned_table, kept_table

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
        Evicts what exceeds this part's share of a budget.
    page_router : PageRouter or None
        Chooses what decoding steps read of it.
    tiers : LayerTiers or None
        Where its full pages may go.
    table : PageTable or None
        What is stored. Its rows are sequences, or lanes of one KV head once heads keep different tokens.
    slots : torch.Tensor or None
        Where the tokens of the last decoding step are, until their experts are known.
    """

    location: PartLocation
    scheduler: PageScheduler | None = None
    page_router: PageRouter | None = None
    tiers: LayerTiers | None = None
    table: PageTable | None = None
    slots: torch.Tensor | None = None

    @property
    def reads_window(self) -> bool:
        """Whether attention takes the window from this part."""
        return self.location.number == 0

    @property
    def device(self) -> torch.device:
        """Where the pages are, once there are any."""
        assert self.table is not None
        return self.table.plain.device

    def begin(
        self,
        config: PiKVConfig,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        home: torch.device,
        shard_of: ShardOf,
        shard_map: ShardMap | None,
    ) -> PageTable:
        """Return an empty table for `(B, H, D, Dv)` K/V of a layer whose attention is on `home`."""
        batch, heads, dim, value_dim = shape
        per_head = self.scheduler is not None and self.scheduler.policy.per_head
        device = home if self.location.device is None else self.location.device
        pool = PlainPool(1 if per_head else heads, dim, value_dim, config.page_size, dtype, device)
        pages = LayerPools(pool, config_of_lanes(config) if per_head else config, self.tiers)
        writer = SequenceWriter(pages, config.num_shards, config.recent_window, config.sink_tokens, shard_of)
        self.share(writer, shard_map)
        table = PageTable(writer, batch * heads if per_head else batch)
        if self.scheduler is not None:
            self.scheduler.prepare(table)
        if self.page_router is not None:
            pages.keep_bounds()
        return table

    def share(self, writer: SequenceWriter, shard_map: ShardMap | None) -> None:
        """Have the writer of this part's table leave to other parts what `shard_map` gives them."""
        # What leaves the window does so in all parts of a process: the first of them counts it.
        writer.write_part(shard_map, self.location.number, counts=self.location.device is None)

    # Storing

    def with_room(self, seen: int, work: Callable[[], _Result]) -> _Result:
        """Do what may need new pages, within the budget, after `seen` positions of the layer."""
        if self.scheduler is None:
            return work()
        assert self.table is not None
        return self.scheduler.with_room(self.table, seen, work)

    def enforce(self, lanes: int, seen: int, headroom: int = 0) -> None:
        """Evict what exceeds a budget in tokens, if pages have changed hands since this was last done."""
        if self.scheduler is not None and self.table is not None and self.table.is_at_page_end:
            self.scheduler.enforce(self.table, lanes, seen, headroom)

    def make_room(self, seen: int, error: NoRoomError) -> None:
        """Evict what a pool of this part needs to go on; see :meth:`PageScheduler.make_room`."""
        assert self.scheduler is not None
        assert self.table is not None
        self.scheduler.make_room(self.table, seen, error)

    def store(self, tokens: TokenBatch, valid: torch.Tensor | None, leaders: list[int]) -> None:
        """Store new tokens: those of the window, and those that go straight to shards of this part.

        Parameters
        ----------
        tokens : TokenBatch
            Q tokens of each of the R rows of the table.
        valid : torch.Tensor, optional
            `(R, Q)` bool, False for padding.
        leaders : list of int
            See :meth:`PageTable.append`.
        """
        assert self.table is not None
        self.table.append(tokens, valid, leaders)

    def credit(self, masses: torch.Tensor, start: int) -> None:
        """Take how the tokens just stored, from position `start` on, were attended to in their own call, `(R, Q)`."""
        if self.scheduler is not None and self.table is not None:
            self.scheduler.credit(self.table, masses.to(self.device), start)

    def append(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Write one decoded token per row, `(R, H', D)` and `(R, H', Dv)`, into the window."""
        assert self.table is not None
        table, pool = self.table, self.table.plain
        self.slots = pool.index(table.next_slots())
        keys, values = carried(keys, pool.device), carried(values, pool.device)
        pool.write_newest(self.slots, keys.transpose(0, 1), values.transpose(0, 1), seen)

    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts `(R,)` int16 of the tokens of :meth:`append`."""
        if self.slots is not None and self.table is not None:
            known = self.table.plain.experts.view(-1)
            known.index_copy_(0, self.slots, carried(experts, known.device))

    # Replacing the table

    def fit(self, table: PageTable, lanes: int, seen: int) -> None:
        """Let a table of `seen` columns that is to replace this part's keep to the budget; statistics begin anew."""
        if self.scheduler is not None:
            self.scheduler.prepare(table)
            self.scheduler.enforce(table, lanes, seen)

    def kept(
        self,
        pending: PendingTokens | None,
        widths: torch.Tensor,
        config: PiKVConfig,
        shard_of: ShardOf,
        shards: ShardMap | None,
        leaders: list[int],
        split: bool,
    ) -> PageTable:
        """Return a table of what is kept of this part and of `pending`."""
        assert self.table is not None
        new = None if pending is None else pending.to(self.device)
        table = kept_table(self.table, new, widths.to(self.device), config, shard_of, leaders, split)
        self.share(table.writer, shards)
        return table

    def assigned(
        self,
        tokens: tuple[torch.Tensor, torch.Tensor],
        held: torch.Tensor | None,
        config: PiKVConfig,
        shard_of: ShardOf,
        shards: ShardMap | None,
        leaders: list[int],
        split: bool,
    ) -> PageTable:
        """Return a table of K/V from outside; see :func:`~pikv_hf.layer.table_rebuild.assigned_table`."""
        keys, values = (part.to(self.device) for part in tokens)
        held = None if held is None else held.to(self.device)
        table = assigned_table(keys, values, held, config, shard_of, leaders, split, self.tiers)
        self.share(table.writer, shards)
        return table

    # Changing rows

    def select(self, indices: Sequence[int], lanes: int) -> None:
        """Replace the sequences by those at `indices`."""
        assert self.table is not None
        if self.scheduler is not None:
            self.scheduler.select(self.table, indices, lanes)
        self.table.select_rows([row * lanes + lane for row in indices for lane in range(lanes)])
        self.slots = None

    def copy_to(self, twin: "LayerPart") -> None:
        """Give another part this one's tokens; both share all pages until either writes to them."""
        twin.tiers = self.tiers
        twin.table = None if self.table is None else self.table.fork()
        if self.scheduler is not None:
            twin.scheduler = self.scheduler.fork()
            if twin.table is not None:
                twin.scheduler.prepare(twin.table)
