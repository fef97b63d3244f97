"""The page pool: fixed-size pages of K/V on one device, with reference counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from .kernels import append_tokens, gather_pages

PageIds = npt.NDArray[np.int64]

# A pool that runs out of pages grows by this share of its size, at least by MIN_GROWTH pages. Small steps waste little
# memory, and copying the pool once every size/16 pages costs less than reading it once every step.
GROWTH = 1 / 16
MIN_GROWTH = 4


class PagePool:
    """Pages of one layer on one device.

    A page holds up to `page_size` tokens of one sequence: the keys and values of all KV heads, each token's position in
    the sequence and its primary expert. Slots fill in order of position; the K/V of slots beyond a page's count are
    finite, so that a masked slot never turns a sum into NaN. Page numbers stay valid when the pool grows.

    Parameters
    ----------
    num_heads, key_dim, value_dim : int
        KV heads and the head dims of keys and values, which may differ.
    page_size : int
        Tokens per page.
    dtype : torch.dtype
        Of keys and values.
    device : torch.device
        Where the pages live.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(H, N, P, D)` and `(H, N, P, Dv)`. Heads come first, so that neighbouring pages are one contiguous block per
        head and attention reads them without a copy.
    positions : torch.Tensor
        `(N, P)` int32, -1 in empty slots.
    experts : torch.Tensor
        `(N, P)` int16, the token's primary expert, -1 where unknown.
    refcount, count, shard, used : numpy.ndarray
        `(N,)` int32 / int16 / int16 / bool: sequences that hold the page (0: free), tokens in it, its shard
        (-1: window), whether it ever held tokens.
    allocations : int
        Calls of :meth:`allocate` so far: while it stands, free pages stay as they are.
    """

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.keys = torch.zeros((num_heads, 0, page_size, key_dim), dtype=dtype, device=device)
        self.values = torch.zeros((num_heads, 0, page_size, value_dim), dtype=dtype, device=device)
        self.positions = torch.full((0, page_size), -1, dtype=torch.int32, device=device)
        self.experts = torch.full((0, page_size), -1, dtype=torch.int16, device=device)
        self.refcount = np.zeros(0, dtype=np.int32)
        self.count = np.zeros(0, dtype=np.int16)
        self.shard = np.zeros(0, dtype=np.int16)
        self.used = np.zeros(0, dtype=np.bool_)
        self.allocations = 0

    @property
    def capacity(self) -> int:
        """Pages allocated, free ones included."""
        return len(self.refcount)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return int(np.count_nonzero(self.refcount == 0))

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the pool's memory."""
        return [self.keys, self.values, self.positions, self.experts]

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""
        per_token = self.keys.shape[0] * (self.keys.shape[-1] + self.values.shape[-1])
        return self.page_size * per_token * self.keys.element_size()

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        return self.refcount.nbytes + self.count.nbytes + self.shard.nbytes + self.used.nbytes

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` can be allocated without growing. Out of memory leaves the pool as it was."""
        missing = pages - self.free_pages
        if missing > 0:
            # The first reservation is exact (a prompt whose size is known); later ones leave room for what follows.
            slack = max(MIN_GROWTH, int(self.capacity * GROWTH)) if self.capacity else 0
            self._grow(max(missing, slack))

    def _grow(self, extra: int) -> None:
        old = self.capacity
        grown = [_extended(tensor, extra, dim) for tensor, dim in zip(self.tensors(), (1, 1, 0, 0), strict=True)]
        self.keys, self.values, self.positions, self.experts = grown
        self.positions[old:] = -1
        self.experts[old:] = -1
        self.refcount = np.append(self.refcount, np.zeros(extra, dtype=np.int32))
        self.count = np.append(self.count, np.zeros(extra, dtype=np.int16))
        self.shard = np.append(self.shard, np.full(extra, -1, dtype=np.int16))
        self.used = np.append(self.used, np.zeros(extra, dtype=np.bool_))

    def allocate(self, pages: int, after: int = -1, shard: int = -1) -> PageIds:
        """Take free pages, side by side where possible.

        Parameters
        ----------
        pages : int
            How many.
        after : int
            A page whose right-hand neighbours are preferred, so that a sequence stays in one piece.
        shard : int
            The shard they will belong to, -1 for the window.

        Returns
        -------
        numpy.ndarray
            `(pages,)` int64 page numbers, each with a reference count of 1 and no tokens.
        """
        self.reserve(pages)
        free = self.refcount == 0
        if after >= 0 and free[after + 1 : after + 1 + pages].sum() == pages:
            ids = np.arange(after + 1, after + 1 + pages)
        else:
            ids = _first_run(np.flatnonzero(free), pages)
        self.refcount[ids] = 1
        self.count[ids] = 0
        self.shard[ids] = shard
        self.wipe(ids)
        self.used[ids] = True
        self.allocations += 1
        return ids

    def wipe(self, ids: PageIds) -> None:
        """Clear what earlier owners left in free pages; K/V too, since masking a NaN leaves a NaN."""
        stale = ids[self.used[ids]]
        if len(stale):
            index = self.index(stale)
            self.positions.index_fill_(0, index, -1)
            self.experts.index_fill_(0, index, -1)
            self.keys.index_fill_(1, index, 0)
            self.values.index_fill_(1, index, 0)

    def hold(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        np.add.at(self.refcount, ids, 1)

    def release(self, ids: PageIds) -> None:
        """Drop a reference to each page; pages without one are free and hold no tokens."""
        np.subtract.at(self.refcount, ids, 1)
        assert (self.refcount[ids] >= 0).all(), "a page was released more often than held"
        self.count[ids[self.refcount[ids] == 0]] = 0

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1."""
        new = int(self.allocate(1, shard=int(self.shard[page]))[0])
        for tensor, dim in zip(self.tensors(), (1, 1, 0, 0), strict=True):
            tensor.select(dim, new).copy_(tensor.select(dim, page))
        self.count[new] = self.count[page]
        return new

    def truncate(self, page: int, count: int) -> None:
        """Forget the tokens of a page beyond the first `count`."""
        self.count[page] = count
        self.positions[page, count:] = -1
        self.experts[page, count:] = -1

    def write(
        self,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        experts: torch.Tensor,
    ) -> None:
        """Store tokens; the caller has counted them.

        Parameters
        ----------
        slots : torch.Tensor
            `(n,)` int64, `page * page_size + offset`.
        keys, values : torch.Tensor
            `(H, n, D)` and `(H, n, Dv)`.
        positions, experts : torch.Tensor
            `(n,)` int32 and int16.
        """
        append_tokens(self.keys, slots, keys)
        append_tokens(self.values, slots, values)
        self.positions.view(-1).index_copy_(0, slots, positions)
        self.experts.view(-1).index_copy_(0, slots, experts)

    def write_newest(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Store one decoded token per slot, all at one position, their experts yet unknown. See :meth:`write`."""
        append_tokens(self.keys, slots, keys)
        append_tokens(self.values, slots, values)
        self.positions.view(-1).index_fill_(0, slots, position)

    def move(self, sources: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy tokens from one set of slots to another, both `(n,)` int64."""
        keys, values = self.flat_keys, self.flat_values
        positions, experts = self.positions.view(-1), self.experts.view(-1)
        self.write(
            slots, keys.index_select(1, sources), values.index_select(1, sources), positions[sources], experts[sources]
        )

    @property
    def flat_keys(self) -> torch.Tensor:
        """`(H, N * P, D)` view of the keys, one row per slot."""
        return self.keys.view(self.keys.shape[0], -1, self.keys.shape[-1])

    @property
    def flat_values(self) -> torch.Tensor:
        """`(H, N * P, Dv)` view of the values, one row per slot."""
        return self.values.view(self.values.shape[0], -1, self.values.shape[-1])

    def gather(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the pages of a `(B, n)` table into `(H, B, n * P, D)` keys and values."""
        return gather_pages(self.keys, table), gather_pages(self.values, table)

    def index(self, ids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pool's device."""
        return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(self.keys.device)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of counts and references if the block raises.

        Token data needs no undo: a block only writes to slots that no count covers yet.
        """
        before = self.refcount.copy(), self.count.copy(), self.shard.copy()
        try:
            yield
        except BaseException:
            self.refcount[: len(before[0])], self.count[: len(before[1])], self.shard[: len(before[2])] = before
            self.refcount[len(before[0]) :] = 0
            raise


def _extended(tensor: torch.Tensor, extra: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] += extra
    # Zeros, not empty memory: a slot without a token is masked, and 0 * NaN would still be NaN.
    grown = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def _first_run(free: PageIds, pages: int) -> PageIds:
    """Return the first `pages` neighbouring numbers in sorted `free`, or its first ones if there is no such run."""
    if pages > 1 and len(free) > pages:
        starts = np.flatnonzero(free[pages - 1 :] - free[: len(free) - pages + 1] == pages - 1)
        if len(starts):
            return free[starts[0] : starts[0] + pages]
    return free[:pages]
