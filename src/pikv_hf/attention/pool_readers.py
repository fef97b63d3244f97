"""Readers of page pools: attention over pages in place, gathered, or chosen by each KV head."""

import dataclasses
from typing import Any, Protocol

import torch

from ..kernels import partial_attention
from ..kernels.coded_attention import coded_attention
from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import PackedPool
from ..pages.plain_pool import PlainPool
from .attention_call import Partial, PieceArgs


@dataclasses.dataclass(frozen=True, slots=True)
class LocatedPages:
    """Pages where kernels can read them.

    Attributes
    ----------
    keys, values : PageCodes
        N entries each, in the format that kernels read.
    numbers : torch.Tensor
        Integers, the shape of the page numbers asked for: the entry at which each of these pages is.
    counts : torch.Tensor
        `(N,)` int32, the tokens of each entry.
    """

    keys: PageCodes
    values: PageCodes
    numbers: torch.Tensor
    counts: torch.Tensor


class PoolReader(Protocol):
    """Reads the pages of one pool, whatever format they are in and wherever they are.

    Queries are folded: the query heads of a KV head lie together, `(lanes, M, D)`, a lane for each KV head of each row.
    """

    @property
    def pool(self) -> Any:
        """The pool, a :class:`~pikv_hf.pages.page_pool.PagePool`."""

    def query(self, queries: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return queries `(H, ..., D)`, or `(H, ..., D + Dv)`, as what is stored expects them, `(H, ..., D')`."""

    def output(self, out: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return outputs `(H, ..., D')` over what is stored in the model's own channels, `(H, ..., Dv)`."""

    def attend_run(self, query: torch.Tensor, start: int, stop: int, args: PieceArgs) -> Partial:
        """Attend to the neighbouring pages `start..stop-1` in place; queries are `(H, M, D')`."""

    def attend_gathered(self, query: torch.Tensor, table: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to copies of the pages of a table `(B, n)` int64; queries are `(H * B, M, D')`."""

    def attend_lanes(self, query: torch.Tensor, pages: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to pages of each KV head's own choice, `(H, B, k)` int64; queries are `(H * B, G, D')`."""

    def located(self, pages: torch.Tensor, stay: bool = True) -> LocatedPages:
        """Return where pages, of any shape and integer dtype, lie: in fast memory, or in copies.

        `stay` says whether pages of slower tiers move into fast memory, if it has room for all of them.
        """

    def pages_at_hand(self, entries: torch.Tensor) -> int:
        """Return how many columns of page numbers `(B, n)` to look up at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads pages that keep their tokens as the model made them. See :class:`PoolReader`."""

    pool: PlainPool

    def query(self, queries: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return the queries as they are."""
        return queries

    def output(self, out: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return the outputs as they are."""
        return out

    def attend_run(self, query: torch.Tensor, start: int, stop: int, args: PieceArgs) -> Partial:
        """Attend to neighbouring pages in place."""
        slots = slice(start * self.pool.page_size, stop * self.pool.page_size)
        keys, values = self.pool.flat_keys[:, slots], self.pool.flat_values[:, slots]
        return partial_attention(query, keys, values, *args.as_kernel_args())

    def attend_gathered(self, query: torch.Tensor, table: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to copies of the pages of a table."""
        keys, values = (part.flatten(0, 1) for part in self.pool.gather(table))
        return partial_attention(query, keys, values, *args.as_kernel_args())

    def attend_lanes(self, query: torch.Tensor, pages: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to pages of each KV head's own choice."""
        index = lane_pages(pages, self.pool.keys.shape[1])
        keys, values = (_picked_lanes(part, index).flatten(1, 2) for part in (self.pool.keys, self.pool.values))
        return partial_attention(query, keys, values, *args.as_kernel_args())

    def located(self, pages: torch.Tensor, stay: bool = True) -> LocatedPages:
        """Return the pool itself: its pages lie at their numbers."""
        size = self.pool.page_size
        keys, values = PageCodes("none", size, self.pool.keys), PageCodes("none", size, self.pool.values)
        return LocatedPages(keys, values, pages, self.pool.counts())

    def pages_at_hand(self, entries: torch.Tensor) -> int:
        """Return all columns: every page is in memory."""
        return entries.shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class PackedReader:
    """Reads packed pages without unpacking more than a block at a time. See :class:`PoolReader`."""

    pool: PackedPool

    def query(self, queries: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return queries in the keys' code space; behind them those for rotary parts, in the values'."""
        if not absorbed:
            return self.pool.key_codec.to_code_space(queries)
        dim = self.pool.key_dim
        parts = queries[..., :dim].contiguous(), queries[..., dim:].contiguous()
        codecs = self.pool.key_codec, self.pool.value_codec
        return torch.cat([codec.to_code_space(part) for codec, part in zip(codecs, parts, strict=True)], dim=-1)

    def output(self, out: torch.Tensor, absorbed: bool) -> torch.Tensor:
        """Return outputs in the code space of the values, or of the latents, in the model's own channels."""
        return (self.pool.key_codec if absorbed else self.pool.value_codec).from_code_space(out)

    def attend_run(self, query: torch.Tensor, start: int, stop: int, args: PieceArgs) -> Partial:
        """Attend to neighbouring pages in place."""
        keys, values = self.pool.keys.narrow(start, stop), self.pool.values.narrow(start, stop)
        return coded_attention(query, keys, values, *args.as_kernel_args())

    def attend_gathered(self, query: torch.Tensor, table: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to copies of the codes of a table's pages."""
        index = table.reshape(-1)
        keys, values = (codes_by_row(codes.pick(index), table.shape) for codes in (self.pool.keys, self.pool.values))
        return coded_attention(query, keys, values, *args.as_kernel_args())

    def attend_lanes(self, query: torch.Tensor, pages: torch.Tensor, args: PieceArgs) -> Partial:
        """Attend to copies of the codes of pages of each KV head's own choice."""
        index = lane_pages(pages, self.pool.keys.pages)
        keys, values = (codes_by_lane(codes, index) for codes in (self.pool.keys, self.pool.values))
        return coded_attention(query, keys, values, *args.as_kernel_args())

    def located(self, pages: torch.Tensor, stay: bool = True) -> LocatedPages:
        """Return the pool itself: its pages lie at their numbers."""
        return LocatedPages(self.pool.keys, self.pool.values, pages, self.pool.counts())

    def pages_at_hand(self, entries: torch.Tensor) -> int:
        """Return all columns: every page is in memory."""
        return entries.shape[1]


def lane_pages(pages: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return pages `(H, B, k)` of a pool of `capacity` pages as pages of a single head, `(H * B, k)`.

    They count through the heads: a pool `(H, N, ...)` seen as `(H * N, ...)`.
    """
    heads = torch.arange(len(pages), device=pages.device)[:, None, None]
    return (heads * capacity + pages).flatten(0, 1)


def codes_by_row(codes: PageCodes, shape: torch.Size) -> PageCodes:
    """Return the pages of a table of this shape `(B, n)`, one after another, as `(H * B, n, ...)`."""
    return codes.map(lambda part: part.unflatten(1, shape).flatten(0, 1))


def codes_by_lane(codes: PageCodes, index: torch.Tensor) -> PageCodes:
    """Return the pages `(L, k)` of :func:`lane_pages`, `(L, k, ...)`."""
    return codes.map(lambda part: _picked_lanes(part, index))


def _picked_lanes(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return pages `(L, k)` of a pool `(H, N, ...)`, counted through its heads, as `(L, k, ...)`."""
    flat = part.reshape(-1, part.shape[2:].numel())
    return flat.index_select(0, index.view(-1)).view(*index.shape, *part.shape[2:])
