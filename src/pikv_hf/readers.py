"""How attention reads the pages of either kind of pool."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from .kernels import merge_pair, partial_attention
from .kernels.coded_attention import coded_attention
from .kernels.page_codes import PageCodes
from .kernels.paged_decode_attention import paged_decode_attention
from .page_book import PageBook
from .pages import PagePool
from .sealed_pool import SealedPool
from .tiered_pool import TieredPool

# (out, lse) of attention over a part of the keys.
Partial = tuple[torch.Tensor, torch.Tensor]

# Codes of keys and of values, where in them pages lie, and the tokens of all that lies there, `(n,)` int32.
Located = tuple[PageCodes, PageCodes, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads pages that keep their tokens as they came.

    Attributes
    ----------
    pool : PagePool
        Where the pages are.
    """

    pool: PagePool

    def codes(self) -> tuple[PageCodes, PageCodes]:
        """Return keys and values in the format that kernels read."""
        size = self.pool.page_size
        return PageCodes("none", size, self.pool.keys), PageCodes("none", size, self.pool.values)

    def query(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries `(H, ..., D)` as the stored keys expect them."""
        return queries

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Return outputs `(H, ..., D')` over stored values in the model's own channels `(H, ..., Dv)`."""
        return out

    def attend_run(
        self,
        query: torch.Tensor,
        start: int,
        stop: int,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None = None,
    ) -> Partial:
        """Attend to pages `start..stop-1` in place; the rest as in :func:`partial_attention`, `(H, M, D)` queries."""
        slots = slice(start * self.pool.page_size, stop * self.pool.page_size)
        keys, values = self.pool.flat_keys[:, slots], self.pool.flat_values[:, slots]
        return partial_attention(query, keys, values, scale, bias, holes, softcap, page_lse)

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
        """Attend to the pages of a table `(B, n)`, copied; queries are `(H * B, M, D)`."""
        keys, values = (part.flatten(0, 1) for part in self.pool.gather(table))
        return partial_attention(query, keys, values, scale, bias, holes, softcap, page_lse)

    def attend_lanes(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None,
    ) -> Partial:
        """Attend to pages of one KV head's own choice.

        Parameters
        ----------
        query : torch.Tensor
            `(H * B, G, D)`, see :meth:`query`.
        pages : torch.Tensor
            `(H, B, k)` int64 page numbers.
        scale, softcap
            As in :func:`partial_attention`.
        bias : torch.Tensor, optional
            `(H * B, 1, k * P)`.
        page_lse : torch.Tensor, optional
            `(H * B, G, k)` float32, written to.
        """
        index = lane_pages(self.pool.frames(pages), self.pool.keys.shape[1])
        keys, values = (_picked_lanes(part, index).flatten(1, 2) for part in (self.pool.keys, self.pool.values))
        return partial_attention(query, keys, values, scale, bias, None, softcap, page_lse)

    def located(self, pages: torch.Tensor, stay: bool = True) -> Located:
        """Return where pages lie; see :meth:`TieredReader.located`."""
        places = self.pool.frames(pages)
        return *self.codes(), places, self.pool.frame_counts()


@dataclasses.dataclass(frozen=True, slots=True)
class SealedReader:
    """Reads packed pages without unpacking more than a block at a time. See :class:`PlainReader`."""

    pool: SealedPool

    def codes(self) -> tuple[PageCodes, PageCodes]:
        """Return keys and values in the format that kernels read."""
        return self.pool.keys, self.pool.values

    def query(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries `(H, ..., D)` in the keys' code space."""
        return self.pool.key_codec.to_code_space(queries)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Return outputs in the values' code space in the model's own channels."""
        return self.pool.value_codec.from_code_space(out)

    def attend_run(
        self,
        query: torch.Tensor,
        start: int,
        stop: int,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None = None,
    ) -> Partial:
        """Attend to pages `start..stop-1` in place."""
        keys, values = self.pool.keys.narrow(start, stop), self.pool.values.narrow(start, stop)
        return coded_attention(query, keys, values, scale, bias, holes, softcap, page_lse)

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
        """Attend to the pages of a table `(B, n)`, their codes copied; queries are `(H * B, M, D')`."""
        index = table.reshape(-1)

        def lanes(part: torch.Tensor) -> torch.Tensor:
            return part.unflatten(1, table.shape).flatten(0, 1)

        keys, values = self.pool.keys.pick(index).map(lanes), self.pool.values.pick(index).map(lanes)
        return coded_attention(query, keys, values, scale, bias, holes, softcap, page_lse)

    def attend_lanes(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        softcap: float | None,
        page_lse: torch.Tensor | None,
    ) -> Partial:
        """Attend to pages of one KV head's own choice, their codes copied; queries are `(H * B, G, D')`."""
        frames = self.pool.frames(pages)
        index = lane_pages(frames, self.pool.keys.pages)
        keys, values = (codes.map(lambda part: _picked_lanes(part, index)) for codes in self.codes())
        return coded_attention(query, keys, values, scale, bias, None, softcap, page_lse)

    def located(self, pages: torch.Tensor, stay: bool = True) -> Located:
        """Return where pages lie; see :meth:`TieredReader.located`."""
        places = self.pool.frames(pages)
        return *self.codes(), places, self.pool.frame_counts()


@dataclasses.dataclass(frozen=True, slots=True)
class TieredReader(SealedReader):
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
            yield number * step, rows[1], _by_row(keys, rows), _by_row(values, rows)

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
        step = columns if self.pool.can_hold(pages) else max(1, self.pool.block_pages() // pages[..., 0].numel())
        result: Partial | None = None
        for start in range(0, max(1, columns), max(1, step)):
            part = slice(start, start + step)
            keys, values, places, _ = self.located(pages[..., part])
            index = lane_pages(places, keys.pages)
            cut = bias[..., start * size : part.stop * size] if bias is not None and bias.shape[-1] > 1 else bias
            out = None if page_lse is None else page_lse[..., part]
            codes = _by_lane(keys, index), _by_lane(values, index)
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
    reader: PlainReader | SealedReader,
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


def lane_pages(pages: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return pages `(H, B, k)` of a pool of `capacity` pages as pages of a single head, `(H * B, k)`.

    They count through the heads: a pool `(H, N, ...)` seen as `(H * N, ...)`.
    """
    heads = torch.arange(len(pages), device=pages.device)[:, None, None]
    return (heads * capacity + pages).flatten(0, 1)


def _by_row(codes: PageCodes, shape: torch.Size) -> PageCodes:
    """Return the pages of a table of this shape `(B, n)`, one after another, as `(H * B, n, ...)`."""
    return codes.map(lambda part: part.unflatten(1, shape).flatten(0, 1))


def _by_lane(codes: PageCodes, index: torch.Tensor) -> PageCodes:
    """Return the pages `(L, k)` of :func:`lane_pages`, `(L, k, ...)`."""
    return codes.map(lambda part: _picked_lanes(part, index))


def _picked_lanes(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return pages `(L, k)` of a pool `(H, N, ...)`, counted through its heads, as `(L, k, ...)`."""
    flat = part.reshape(-1, part.shape[2:].numel())
    return flat.index_select(0, index.view(-1)).view(*index.shape, *part.shape[2:])


def reader_of(pool: PageBook) -> PlainReader | SealedReader:
    """Return the reader of a pool."""
    if isinstance(pool, PagePool):
        return PlainReader(pool)
    if isinstance(pool, TieredPool):
        return TieredReader(pool)
    assert isinstance(pool, SealedPool)
    return SealedReader(pool)
