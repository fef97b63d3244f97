"""How attention reads the pages of either kind of pool."""

import dataclasses

import torch

from ..kernels import partial_attention
from ..kernels.coded_attention import coded_attention
from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import PackedPool
from ..pages.plain_pool import PlainPool

# (out, lse) of attention over a part of the keys.
Partial = tuple[torch.Tensor, torch.Tensor]

# Codes of keys and of values, where in them pages lie, and the tokens of all that lies there, `(n,)` int32.
Located = tuple[PageCodes, PageCodes, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads pages that keep their tokens as they came.

    Attributes
    ----------
    pool : PlainPool
        Where the pages are.
    """

    pool: PlainPool

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
        """Return where pages lie; in fast memory or in copies, which `stay` asks for."""
        places = self.pool.frames(pages)
        return *self.codes(), places, self.pool.frame_counts()


@dataclasses.dataclass(frozen=True, slots=True)
class PackedReader:
    """Reads packed pages without unpacking more than a block at a time. See :class:`PlainReader`."""

    pool: PackedPool

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
        """Return where pages lie; in fast memory or in copies, which `stay` asks for."""
        places = self.pool.frames(pages)
        return *self.codes(), places, self.pool.frame_counts()


def lane_pages(pages: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return pages `(H, B, k)` of a pool of `capacity` pages as pages of a single head, `(H * B, k)`.

    They count through the heads: a pool `(H, N, ...)` seen as `(H * N, ...)`.
    """
    heads = torch.arange(len(pages), device=pages.device)[:, None, None]
    return (heads * capacity + pages).flatten(0, 1)


def by_row(codes: PageCodes, shape: torch.Size) -> PageCodes:
    """Return the pages of a table of this shape `(B, n)`, one after another, as `(H * B, n, ...)`."""
    return codes.map(lambda part: part.unflatten(1, shape).flatten(0, 1))


def by_lane(codes: PageCodes, index: torch.Tensor) -> PageCodes:
    """Return the pages `(L, k)` of :func:`lane_pages`, `(L, k, ...)`."""
    return codes.map(lambda part: _picked_lanes(part, index))


def _picked_lanes(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return pages `(L, k)` of a pool `(H, N, ...)`, counted through its heads, as `(L, k, ...)`."""
    flat = part.reshape(-1, part.shape[2:].numel())
    return flat.index_select(0, index.view(-1)).view(*index.shape, *part.shape[2:])
