"""Reader of a pool of which only some pages are in fast memory."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ..kernels import merge_pair
from ..kernels.coded_attention import coded_attention
from ..kernels.page_codes import PageCodes
from ..tiers.tiered_pool import TieredPool
from .attention_call import Partial, PieceArgs
from .pool_readers import LocatedPages, PackedReader, codes_by_lane, codes_by_row, lane_pages


@dataclasses.dataclass(frozen=True, slots=True)
class TieredReader(PackedReader):
    """Reads packed pages of which only some are in fast memory. See :class:`~.pool_readers.PoolReader`.

    Reading all pages of a row moves none: those of slower tiers pass through a buffer, a block at a time, while the
    next block is read. Were they to stay, each would push out one that is wanted before it in the next step. Pages that
    a lane chooses do stay.
    """

    pool: TieredPool

    def attend_gathered(self, query: torch.Tensor, table: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to the pages of a table, a block of columns at a time."""
        result: Partial | None = None
        for start, columns, keys, values in self._streamed(table):
            piece = args.of_pages(start, columns, self.pool.page_size)
            partial = coded_attention(query, keys, values, *piece.as_kernel_args())
            result = partial if result is None else merge_pair(*result, *partial)
        assert result is not None
        return result

    def _streamed(self, table: torch.Tensor) -> Iterator[tuple[int, int, PageCodes, PageCodes]]:
        """Yield the first column and the columns of each block, and its codes by lane, `(H * B, columns, ...)`."""
        step = max(1, self.pool.chunk_pages() // max(1, len(table)))
        blocks = table.split(step, dim=1)
        for number, block in enumerate(blocks):
            keys, values = self.pool.codes_at(block.reshape(-1), reads=True)
            if number + 1 < len(blocks):
                self.pool.prefetch(blocks[number + 1].cpu().numpy())
            rows = block.shape
            yield number * step, rows[1], codes_by_row(keys, rows), codes_by_row(values, rows)

    def attend_lanes(self, query: torch.Tensor, pages: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to pages of each KV head's own choice; they stay in fast memory if it has room for all of them."""
        columns = pages.shape[2]
        stay = self.pool.can_hold(pages)
        step = columns if stay else max(1, self.pool.chunk_pages() // pages[..., 0].numel())
        result: Partial | None = None
        for start in range(0, max(1, columns), max(1, step)):
            block = pages[..., start : start + step]
            located = self.located(block, stay)
            index = lane_pages(located.numbers, located.keys.pages)
            keys, values = codes_by_lane(located.keys, index), codes_by_lane(located.values, index)
            piece = args.of_pages(start, block.shape[2], self.pool.page_size)
            partial = coded_attention(query, keys, values, *piece.as_kernel_args())
            result = partial if result is None else merge_pair(*result, *partial)
        assert result is not None
        return result

    def located(self, pages: torch.Tensor, stay: bool = True) -> LocatedPages:
        """Return the frames of pages, or copies of them if fast memory cannot hold them all."""
        pool = self.pool
        if pool.can_hold(pages, stay):
            # Before the tensors are looked at: fetching may replace them by longer ones.
            frames = pool.fetch(pages.long())
            return LocatedPages(pool.keys, pool.values, frames, pool.frame_counts())
        ids = np.unique(pages.cpu().numpy())
        index = pool.index(ids)
        numbers = pool.index(np.searchsorted(ids, pages.cpu().numpy()))
        return LocatedPages(*pool.codes_at(index, reads=True), numbers, pool.counts_of(index))

    def pages_at_hand(self, entries: torch.Tensor) -> int:
        """Return all columns if fast memory holds them, else as many as a block of copies may have."""
        if self.pool.can_hold(entries, fetched=False):
            return entries.shape[1]
        return max(1, self.pool.chunk_pages() // len(entries))
