"""How attention reads pages of which only some are in fast memory."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ..kernels import merge_pair
from ..kernels.coded_attention import coded_attention
from ..kernels.page_codes import PageCodes
from ..kernels.paged_decode_attention import paged_decode_attention
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..tiers.tiered_pool import TieredPool
from .pool_readers import Located, PackedReader, Partial, PlainReader, by_lane, by_row, lane_pages


@dataclasses.dataclass(frozen=True, slots=True)
class TieredReader(PackedReader):
    """Reads pages of which only some are in fast memory. See :class:`PlainReader`.

    Reading all pages of a row moves none: those of slower tiers pass through a buffer, a block at a time, while the
    next block is read. Were they to stay, each would push out one that is wanted before it in the next step. Pages that
    a lane chooses do stay.
    """

    pool: TieredPool

    def attend_gathered(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None = None,
    ) -> Partial:
        """Attend to the pages of a table `(B, n)`, a block at a time; queries are `(H * B, M, D')`."""
        size = self.pool.page_size
        result: Partial | None = None
        for start, block, keys, values in self._streamed(table):
            slots = slice(start * size, (start + block) * size)
            inside = None if holes is None else holes[(holes >= slots.start) & (holes < slots.stop)] - slots.start
            cut = bias[..., slots] if bias is not None and bias.shape[-1] > 1 else bias
            pages = None if page_lse is None else page_lse[..., start : start + block]
            part = coded_attention(query, keys, values, scale, cut, inside, softcap, pages)
            result = part if result is None else merge_pair(*result, *part)
        assert result is not None
        return result

    def _streamed(self, table: torch.Tensor) -> Iterator[tuple[int, int, PageCodes, PageCodes]]:
        """Yield the first column and the columns of each block, and its codes by lane, `(H * B, columns, ...)`."""
        step = max(1, self.pool.block_pages() // max(1, len(table)))
        blocks = table.split(step, dim=1)
        for number, block in enumerate(blocks):
            keys, values = self.pool.codes_at(block.reshape(-1), reads=True)
            if number + 1 < len(blocks):
                self.pool.prefetch(blocks[number + 1].cpu().numpy())
            rows = block.shape
            yield number * step, rows[1], by_row(keys, rows), by_row(values, rows)

    def attend_lanes(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None,
    ) -> Partial:
        """Attend to pages of one KV head's own choice; queries are `(H * B, G, D')`.

        They stay in fast memory, unless it has no room for all of them.
        """
        size, columns = self.pool.page_size, pages.shape[2]
        stay = self.pool.can_hold(pages)
        step = columns if stay else max(1, self.pool.block_pages() // pages[..., 0].numel())
        result: Partial | None = None
        for start in range(0, max(1, columns), max(1, step)):
            part = slice(start, start + step)
            keys, values, places, _ = self.located(pages[..., part], stay)
            index = lane_pages(places, keys.pages)
            cut = bias[..., start * size : part.stop * size] if bias is not None and bias.shape[-1] > 1 else bias
            out = None if page_lse is None else page_lse[..., part]
            codes = by_lane(keys, index), by_lane(values, index)
            partial = coded_attention(query, *codes, scale, cut, None, softcap, out)
            result = partial if result is None else merge_pair(*result, *partial)
        assert result is not None
        return result

    def located(self, pages: torch.Tensor, stay: bool = True) -> Located:
        """Return where pages lie, in fast memory or in copies.

        Parameters
        ----------
        pages : torch.Tensor
            Page numbers, of any shape and integer dtype.
        stay : bool
            Whether pages move into fast memory if it has room for all of them.
        """
        if self.pool.can_hold(pages, stay):
            places = self.pool.frames(pages.long())
            return *self.codes(), places, self.pool.frame_counts()
        ids = np.unique(pages.cpu().numpy())
        index = self.pool.index(ids)
        places = self.pool.index(np.searchsorted(ids, pages.cpu().numpy()))
        return *self.pool.codes_at(index, reads=True), places, self.pool.counts_of(index)


def look_up(
    reader: PlainReader | PackedReader,
    query: torch.Tensor,
    entries: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    softcap: float | None,
    page_lse: torch.Tensor | None = None,
) -> Partial:
    """Attend to whole rows of a pool by :func:`paged_decode_attention`, as many pages at a time as are at hand.

    `query` is `(B, Hq, D')`, `entries` `(B, n)` int32 page numbers, of which `lengths` `(B,)` count; `page_lse`
    `(B, Hq, n)` float32 is written to.
    """
    pool, columns = reader.pool, entries.shape[1]
    step = columns
    if isinstance(pool, TieredPool) and not pool.can_hold(entries, fetched=False):
        step = max(1, pool.block_pages() // len(entries))
    result: Partial | None = None
    for start in range(0, columns, step):
        keys, values, places, counts = reader.located(entries[:, start : start + step], stay=False)
        held = (lengths - start).clamp(0, step)
        arguments = query, keys, values, places.int(), held, counts, scale, softcap
        if page_lse is None:
            out, lse = paged_decode_attention(*arguments)
        else:
            out, lse, page_lse[:, :, start : start + step] = paged_decode_attention(*arguments, page_lse=True)
        result = (out, lse) if result is None else merge_pair(*result, out, lse)
    assert result is not None
    return result


def reader_of(pool: PagePool) -> PlainReader | PackedReader:
    """Return the reader of a pool."""
    if isinstance(pool, PlainPool):
        return PlainReader(pool)
    if isinstance(pool, TieredPool):
        return TieredReader(pool)
    assert isinstance(pool, PackedPool)
    return PackedReader(pool)
