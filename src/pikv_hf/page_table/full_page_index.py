"""Index of the full pages of a table's rows, with what page routers compare of them."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..kernels.page_codes import spread_values
from ..kernels.page_masses import page_masses
from ..kernels.page_scores import page_scores
from ..pages.page_pool import PagePool
from ..pages.pool_id import PoolId
from ..pages.types import PageIds
from .sequence_pages import SequencePages


@dataclasses.dataclass(slots=True)
class FullPageIndex:
    """Index of full pages: each row has its pages in *columns*, those of the first pool, then those of the next.

    Attributes
    ----------
    pools : dict
        Those that have any of the pages.
    columns : dict of PoolId to slice
        Which columns are of a pool.
    pages : torch.Tensor
        `(B, n)` int64 page numbers within the column's pool; where unused another of the row's own, 0 if it has none.
    valid : torch.Tensor
        `(B, n)` bool; rows have their pages of a pool first.
    lengths : dict of PoolId to torch.Tensor
        `(B,)` int32, the valid columns of each pool.
    counts, oldest, newest, shards : torch.Tensor
        `(B, n)` int64, tokens in the page, least and largest position, and its shard.
    full : bool
        Whether every valid page is full.
    page_count, fewest, first, last : int
        Valid columns of all rows, the fewest of any, and the least and largest position of any page.
    """

    pools: dict[PoolId, PagePool]
    columns: dict[PoolId, slice]
    pages: torch.Tensor
    valid: torch.Tensor
    lengths: dict[PoolId, torch.Tensor]
    counts: torch.Tensor
    oldest: torch.Tensor
    newest: torch.Tensor
    shards: torch.Tensor
    full: bool
    page_count: int
    fewest: int
    first: int
    last: int
    _shard_ends: torch.Tensor | None = None
    _places: torch.Tensor | None = None
    _found: set[tuple[PoolId, str]] = dataclasses.field(default_factory=set)

    @classmethod
    def from_rows(cls, rows: Sequence[SequencePages], pools: Mapping[PoolId, PagePool]) -> "FullPageIndex":
        """Index the full pages of rows."""
        device = next(iter(pools.values())).device
        of_pool = {pool_id: [row.full_pages(pool_id) for row in rows] for pool_id in pools}
        used = {pool_id: pools[pool_id] for pool_id, pages in of_pool.items() if any(map(len, pages))}
        parts = [torch.zeros((6, len(rows), 0), dtype=torch.int64, device=device)]
        parts += [_columns_of(pool, of_pool[pool_id]) for pool_id, pool in used.items()]
        pages, valid, counts, shards, oldest, newest = torch.cat(parts, dim=2)
        ends = list(itertools.accumulate(part.shape[2] for part in parts))
        columns = {pool_id: slice(*span) for pool_id, span in zip(used, itertools.pairwise(ends), strict=True)}
        lengths = {
            pool_id: torch.tensor([len(own) for own in of_pool[pool_id]], dtype=torch.int32, device=device)
            for pool_id in used
        }
        is_valid = valid.bool()
        some = pages.numel() > 0
        return cls(
            pools=used,
            columns=columns,
            pages=pages,
            valid=is_valid,
            lengths=lengths,
            counts=counts,
            oldest=oldest,
            newest=newest,
            shards=shards,
            full=all(_are_full(pool, of_pool[pool_id]) for pool_id, pool in used.items()),
            page_count=sum(map(len, itertools.chain.from_iterable(of_pool.values()))),
            fewest=int(valid.sum(dim=1).min()) if some else 0,
            first=int(oldest[is_valid].min()) if some else 0,
            last=int(newest[is_valid].max()) if some else -1,
        )

    @property
    def width(self) -> int:
        """Columns, n."""
        return self.pages.shape[1]

    @property
    def heads(self) -> int:
        """KV heads of each row, H."""
        return next(iter(self.pools.values())).token_tensors()[0].shape[0]

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        ends = [found for found in (self._shard_ends, self._places) if found is not None]
        columns = [self.pages, self.valid, self.counts, self.oldest, self.newest, self.shards]
        return [*columns, *self.lengths.values(), *ends]

    def places(self) -> torch.Tensor:
        """Return where the token at each position is, `(B, last + 1)` int64: `column * P + slot`, -1 if in no page."""
        if self._places is None:
            # One more position, for slots without a token.
            places = torch.full((len(self.pages), self.last + 2), -1, dtype=torch.int64, device=self.pages.device)
            for pool_id, pool in self.pools.items():
                part = self.columns[pool_id]
                positions = pool.positions[self.pages[:, part]].long()
                held = self.valid[:, part, None] & (positions >= 0)
                positions = positions.masked_fill(~held, self.last + 1).flatten(1)
                first = part.start * pool.page_size
                slots = torch.arange(first, first + positions.shape[1], device=positions.device)
                places.scatter_(1, positions, slots.expand_as(positions))
            places[:, -1] = -1
            self._places = places
        return self._places

    def bounds(self, query: torch.Tensor) -> torch.Tensor:
        """Return upper bounds of `q . k` over each page's keys and a KV head's queries.

        Parameters
        ----------
        query : torch.Tensor
            `(B, Hq, D)`.

        Returns
        -------
        torch.Tensor
            `(H, B, n)` float32, `-inf` where unused.
        """
        return self._scores(query, 1)

    def ranges(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the bounds of each page's keys leave `q . k`, for each query head alone.

        Parameters
        ----------
        query : torch.Tensor
            `(B, Hq, D)`.

        Returns
        -------
        tuple of torch.Tensor
            `(H, G, B, n)` float32, the middles of the ranges and half their widths; of no meaning where unused.
        """
        batch, query_heads, dim = query.shape
        groups = query_heads // self.heads
        by_group = query.reshape(batch, self.heads, groups, dim).permute(2, 0, 1, 3)
        # The least product with q is the largest with -q: one pass over the bounds finds both.
        ends = self._scores(torch.cat([by_group, -by_group]).flatten(0, 1), 2 * groups)
        most, least = ends.view(self.heads, 2, groups, batch, -1).unbind(1)
        return (most - least) / 2, (most + least) / 2

    def _scores(self, query: torch.Tensor, copies: int) -> torch.Tensor:
        """Return the bounds for several sets of queries at once, `(copies * B, Hq, D)`: `(H, copies * B, n)`."""
        scores = []
        for pool_id, pool in self.pools.items():
            low, high = pool.key_bounds(self._own(pool_id, "bounds"))
            table, lengths = self.pages[:, self.columns[pool_id]].int(), self.lengths[pool_id]
            if copies > 1:
                table, lengths = table.repeat(copies, 1), lengths.repeat(copies)
            scores.append(page_scores(query, low, high, table, lengths).transpose(0, 1))
        return torch.cat(scores, dim=2)

    def masses(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the log-sum-exp of the logits of each page's keys, as their 2-bit codes tell, for each query head.

        Parameters
        ----------
        query : torch.Tensor
            `(B, Hq, D)`.
        scale : float
            Factor on the logits.

        Returns
        -------
        torch.Tensor
            `(H, G, B, n)` float32, `-inf` where unused.
        """
        masses = []
        for pool_id, pool in self.pools.items():
            keys = pool.key_codes(self._own(pool_id, "codes"))
            table, lengths = self.pages[:, self.columns[pool_id]].int(), self.lengths[pool_id]
            masses.append(page_masses(query, keys, table, lengths, pool.counts(), scale))
        return torch.cat(masses, dim=2).unflatten(1, (self.heads, -1)).permute(1, 2, 0, 3)

    def shard_ends(self) -> torch.Tensor:
        """Return what bounds the keys of each shard.

        Returns
        -------
        torch.Tensor
            `(H, B, S, 3 * D)` float32: least values, largest values, and the mean of the middles of the shard's pages.
            A shard without a page has an empty range, the largest value below the least.
        """
        if self._shard_ends is None:
            parts = [self._pool_ends(pool_id) for pool_id in self.pools]
            low, high = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
            heads, _, _, dim = low.shape
            count = int(self.shards.max()) + 1 if self.width else 0
            shape = (heads, len(self.pages), count, dim)
            index = self.shards.clamp_min(0)[None, :, :, None].expand(heads, -1, -1, dim)
            unused = ~self.valid[None, :, :, None]
            least = low.new_full(shape, torch.inf)
            least.scatter_reduce_(2, index, low.masked_fill(unused, torch.inf), "amin")
            most = low.new_full(shape, -torch.inf)
            most.scatter_reduce_(2, index, high.masked_fill(unused, -torch.inf), "amax")
            middle = ((low + high) / 2).masked_fill(unused, 0)
            total = torch.zeros(shape, device=low.device).scatter_add_(2, index, middle)
            tokens = torch.zeros((len(self.pages), count), device=low.device)
            tokens.scatter_add_(1, self.shards.clamp_min(0), self.valid.float())
            self._shard_ends = torch.cat([least, most, total / tokens.clamp_min(1)[None, :, :, None]], dim=3)
        return self._shard_ends

    def _pool_ends(self, pool_id: PoolId) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.pools[pool_id].key_bounds(self._own(pool_id, "bounds"))
        index = self.pages[:, self.columns[pool_id]].reshape(-1)
        shape = len(self.pages), -1
        least, most = (part.index_select(1, index).unflatten(1, shape) for part in (low, high))
        return least.float(), spread_values(most) + least.float() if most.dtype == torch.uint8 else most.float()

    def _own(self, pool_id: PoolId, what: str) -> np.ndarray:
        """Return the pages of which it may be unknown, bounds or codes: full pages stay as they are."""
        if (pool_id, what) in self._found:
            return np.zeros(0, dtype=np.int64)
        self._found.add((pool_id, what))
        part = self.columns[pool_id]
        return np.unique(self.pages[:, part][self.valid[:, part]].cpu().numpy())


def _are_full(pool: PagePool, rows: Sequence[PageIds]) -> bool:
    return bool((pool.count[np.concatenate(rows)] == pool.page_size).all())


def _columns_of(pool: PagePool, rows: Sequence[PageIds]) -> torch.Tensor:
    """Return number, use, count, shard, oldest and newest position of the pages of rows, `(6, B, n)` int64."""
    table = np.zeros((2, len(rows), max(map(len, rows))), dtype=np.int64)
    for row, own in enumerate(rows):
        # Filled up with a page of its own: nothing of another row is read, not even to be masked.
        table[0, row] = own[0] if len(own) else 0
        table[0, row, : len(own)], table[1, row, : len(own)] = own, 1
    known = np.stack([*table, pool.count[table[0]], pool.shard[table[0]]])
    positions = pool.positions[pool.index(table[0])].long()
    oldest = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).amin(dim=2)
    return torch.cat([pool.index(known), torch.stack([oldest, positions.amax(dim=2)])])
