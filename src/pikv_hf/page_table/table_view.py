"""What attention reads of a page table: plans, entries for kernels, the index of full pages, and dense K/V."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..common.kv import KV
from ..kernels.page_lists import PageLists
from ..pages.page_pool import PagePool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from ..tiers.tiered_pool import TieredPool
from .full_page_index import FullPageIndex
from .listed_pages import ListedPages
from .read_plan import MIN_RUN_BYTES, ReadPlan, make_plan
from .sequence_pages import Region, SequencePages, distinct_sequences
from .sequence_writer import SequenceWriter


class TableView:
    """Snapshot of a page table for reading: plans and indexes are made once and last until pages change hands.

    Parameters
    ----------
    writer : SequenceWriter
        Of the table, for its pools. The view of a part that does not read its window has it in
        :attr:`Region.WINDOW` alone.
    rows : sequence of SequencePages
        B rows.
    """

    def __init__(self, writer: SequenceWriter, rows: Sequence[SequencePages]) -> None:
        self._writer, self._rows = writer, rows
        self._plans: dict[PoolId | Region, tuple[ReadPlan, int]] = {}
        self._listed: dict[PoolId | Region | None, ListedPages] = {}
        self._entries: dict[PoolId | Region, tuple[torch.Tensor, torch.Tensor]] = {}
        self._index: FullPageIndex | None = None

    def pool_of(self, region: PoolId | Region) -> PagePool:
        """Return a pool by its id, or the one that a region is part of."""
        return self._writer.plain if isinstance(region, Region) else self._writer.pools.by_id()[region]

    def plan(self, region: PoolId | Region = PLAIN) -> ReadPlan:
        """Return how attention reads the rows' pages of a pool, or of a region of the plain one."""
        plan, made_at = self._plans.get(region, (None, -1))
        if plan is None or (len(plan.bridged) and made_at != self.pool_of(region).allocator.allocations):
            plan = self._new_plan(region)
        return plan

    def _new_plan(self, region: PoolId | Region) -> ReadPlan:
        pool = self.pool_of(region)
        members: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(self._rows):
            members[id(row)].append(index)
        pages = [self._pages(sequence, region) for sequence in distinct_sequences(self._rows)]
        # Pages that may move are never read as neighbours.
        movable = isinstance(pool, TieredPool)
        min_run = pool.capacity + 1 if movable else max(2, MIN_RUN_BYTES // pool.page_bytes)
        free = pool.allocator.refcount == 0
        plan = make_plan(pages, list(members.values()), free, pool.count, pool.page_size, min_run)
        # The free pages that a run reads past must stay free and clean; another fork may allocate them.
        pool.clear_free(plan.bridged)
        self._plans[region] = plan, pool.allocator.allocations
        return plan

    def entries(self, region: PoolId | Region) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pages of a pool by row, for kernels that look pages up. See :meth:`plan`.

        Returns
        -------
        tuple of torch.Tensor
            `(B, n)` int32 page numbers and `(B,)` int32, how many of them count.
        """
        if region not in self._entries:
            rows = [self._pages(row, region) for row in self._rows]
            lengths = np.array([len(row) for row in rows], dtype=np.int32)
            numbers = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int32)
            for line, row in zip(numbers, rows, strict=True):
                line[: len(row)] = row
            device = self._writer.plain.device
            self._entries[region] = torch.from_numpy(numbers).to(device), torch.from_numpy(lengths).to(device)
        return self._entries[region]

    def lists(self, region: PoolId | Region | None = None) -> PageLists | None:
        """Return the lists of the rows' pages in a pool or a region of one, or in all pools, for a compiled kernel.

        None where there is no such kernel for these pages, and for all pools if a codec has channels of its own.
        """
        known = self._listed.get(region)
        if known is None or not known.is_current:
            known = self._listed[region] = self._new_lists(region)
        return known.lists

    def _new_lists(self, region: PoolId | Region | None) -> ListedPages:
        every = self._writer.pools.by_id()
        regions = list(every) if region is None else [region]
        pools = [self.pool_of(each) for each in regions]
        codecs = [codec for pool in self._writer.pools.packed.values() for codec in (pool.key_codec, pool.value_codec)]
        if region is None and any(codec.basis is not None for codec in codecs):
            return ListedPages(None)
        newest = np.array([row.window[-1] for row in self._rows if row.window], dtype=np.int64)
        return ListedPages.of_rows(pools, [[self._pages(row, each) for row in self._rows] for each in regions], newest)

    def full_pages(self) -> FullPageIndex:
        """Return the index of the rows' full pages, for routing."""
        if self._index is None:
            self._index = FullPageIndex.from_rows(self._rows, self._writer.pools.by_id())
        return self._index

    @property
    def always_read(self) -> int:
        """Pages that a step reads whatever routing says, over all rows."""
        return sum(len(self._pages(row, Region.UNFILLED)) for row in self._rows)

    # Dense

    def dense(self, length: int, pools: Iterable[PoolId] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K/V by position, `(B, H, length, D)` and `(B, H, length, Dv)`; zeros where nothing is stored.

        `pools` are those to read, by default all.
        """
        return self.dense_part(length, KV.KEYS, pools), self.dense_part(length, KV.VALUES, pools)

    def dense_part(self, length: int, which: KV, pools: Iterable[PoolId] | None = None, start: int = 0) -> torch.Tensor:
        """Return only the keys, or only the values, of :meth:`dense`, from position `start` on."""
        plain = self._writer.plain.keys if which is KV.KEYS else self._writer.plain.values
        part = plain.new_zeros((len(self._rows), plain.shape[0], length - start, plain.shape[-1]))
        for row, pool, ids in self._read(pools):
            if start:
                ids = ids[(pool.positions[ids] >= start).any(dim=1)]
            positions = pool.positions[ids].view(-1)
            stored = (positions >= start).nonzero().squeeze(1)
            tokens = pool.decoded(ids, which).index_select(1, stored)
            part[row].index_copy_(1, positions[stored].long() - start, tokens)
        return part

    def experts_part(self, length: int, start: int) -> torch.Tensor:
        """Return the primary experts of the tokens from a position on, `(B, length - start)` int16, -1 if unknown."""
        plain = self._writer.plain
        experts = plain.experts.new_full((len(self._rows), length - start), -1)
        for row, pool, ids in self._read([PLAIN]):
            positions = pool.positions[ids].view(-1)
            stored = (positions >= start).nonzero().squeeze(1)
            experts[row, positions[stored].long() - start] = pool.experts[ids].view(-1)[stored]
        return experts

    def stored_mask(self, length: int, pools: Iterable[PoolId] | None = None) -> torch.Tensor:
        """Return `(B, length)` bool, at which positions the rows hold a token in these pools, by default in any."""
        stored = torch.zeros((len(self._rows), length), dtype=torch.bool, device=self._writer.plain.device)
        for row, pool, ids in self._read(pools):
            positions = pool.positions[ids]
            stored[row, positions[positions >= 0].long()] = True
        return stored

    # Pages

    def _pages(self, sequence: SequencePages, region: PoolId | Region) -> PageIds:
        """Return the pages of a sequence that attention reads; see :meth:`plan`."""
        if region is Region.WINDOW:
            return np.asarray(sequence.window, dtype=np.int64)
        pages = sequence.unfilled() if isinstance(region, Region) else sequence.pages(region)
        # The window's come first in both.
        in_plain = isinstance(region, Region) or region == PLAIN
        return pages[len(sequence.window) :] if in_plain and not self._writer.reads_window else pages

    def _read(self, pools: Iterable[PoolId] | None) -> Iterator[tuple[int, PagePool, torch.Tensor]]:
        """Yield each row's pages `(n,)` in each of the pools."""
        known = self._writer.pools.by_id()
        for pool_id in known if pools is None else pools:
            if (pool := known.get(pool_id)) is not None:
                for row, sequence in enumerate(self._rows):
                    if len(pages := self._pages(sequence, pool_id)):
                        yield row, pool, pool.index(pages)
