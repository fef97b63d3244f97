"""A pool of fixed-size pages: what is kept of every page, its allocation and its growth; subclasses keep the K/V."""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ..common.tensors import resized
from .page_allocator import PageAllocator
from .page_notes import PageNotes
from .pool_growth import NoRoomError, growth_of, kept_free
from .types import Droppable, PageIds

#: The most bytes that the host keeps of a page: counts, errors, and its number in a table.
HOST_BYTES_PER_PAGE = 48


class PagePool(PageNotes):
    """The pages of one layer on one device: their tokens' positions, and who refers to them.

    A page holds up to `page_size` tokens of one sequence, of all KV heads, in order of position. Page numbers stay
    valid when the pool grows.

    Parameters
    ----------
    page_size : int
        Tokens per page.
    device : torch.device
        Where the pages live.
    growth : float
        The share of its size by which the pool grows. Small steps waste little memory, and copying the pool once every
        few hundred tokens costs less than reading it at each.
    keeps_experts : bool
        Whether tokens may still move to the shards of their experts.

    Attributes
    ----------
    allocator : PageAllocator
        The free list and the reference counts.
    growth_limit : callable, optional
        Returns the bytes by which the pool may grow; without one there is no limit.
    positions : torch.Tensor
        `(N, P)` int32, -1 in empty slots.
    experts : torch.Tensor
        `(N, P)` int16, the token's primary expert, -1 where unknown; `(N, 0)` where it is not kept.
    count, shard, used : numpy.ndarray
        `(N,)` int16 / int16 / bool: tokens in the page, its shard (-1: window), whether it ever held tokens.
    """

    #: The host's arrays with an entry per page, by attribute: the entry of a new page.
    new_page: ClassVar[Mapping[str, np.ndarray | np.generic]] = {
        "count": np.int16(0),
        "shard": np.int16(-1),
        "used": np.bool_(False),
    }
    #: Those of them that a transaction undoes.
    undone: ClassVar[tuple[str, ...]] = ("count", "shard")
    count: np.ndarray
    shard: np.ndarray
    used: np.ndarray

    def __init__(self, page_size: int, device: torch.device, growth: float, keeps_experts: bool = True) -> None:
        super().__init__()
        self.page_size, self.device, self.growth = page_size, device, growth
        self.growth_limit: Callable[[], int] | None = None
        self.allocator = PageAllocator()
        self.positions = torch.full((0, page_size), -1, dtype=torch.int32, device=device)
        self.experts = torch.full((0, page_size if keeps_experts else 0), -1, dtype=torch.int16, device=device)
        self._followers: weakref.WeakSet[Droppable] = weakref.WeakSet()
        # Running transactions, and what they have wiped: pages, their positions and experts before.
        self._transactions = 0
        self._wiped: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for name, entry in self.new_page.items():
            setattr(self, name, np.zeros((0, *np.shape(entry)), dtype=entry.dtype))

    # What a subclass keeps of a page

    @abstractmethod
    def token_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold K/V, `(H, N, ...)` each."""

    def _page_tensors(self) -> list[torch.Tensor]:
        """Return those of :meth:`token_tensors` that have an entry per page number."""
        return self.token_tensors()

    @abstractmethod
    def _replace_tokens(self, tensors: list[torch.Tensor]) -> None:
        """Take grown copies of :meth:`token_tensors`, in that order."""

    # What is known of pages

    @property
    def capacity(self) -> int:
        """Pages, free ones included."""
        return len(self.count)

    def follow(self, reader: Droppable) -> None:
        """Drop what a reader knows of the tensors when they are next replaced; it then has to follow again."""
        self._followers.add(reader)

    def index(self, ids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pool's device."""
        return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(self.device)

    def counts(self) -> torch.Tensor:
        """Return the tokens in each page, `(N,)` int32 on the device; stale in free pages."""
        # Always up to date in the positions, which a decoded token's slot is given when it is written.
        return (self.positions >= 0).sum(dim=1, dtype=torch.int32)

    # Memory

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the pool's memory."""
        beside = [tensor for each in self._kept_beside() for tensor in each.tensors()]
        return [*self.token_tensors(), self.positions, self.experts, *beside]

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""
        return sum(t.element_size() * t.shape[0] * t[:1, :1].shape[2:].numel() for t in self.token_tensors())

    @property
    def full_page_bytes(self) -> int:
        """Bytes by which a page makes the pool larger, with everything that is kept beside its keys and values."""
        tokens = (self.positions.element_size() + self.experts.element_size()) * self.page_size
        # Of a single page, which the pool need not have yet.
        beside = [tensor for each in self._kept_beside() for tensor in each.tensors()]
        known = sum(each.shape[0] * each.shape[2:].numel() * each.element_size() for each in beside)
        return self.page_bytes + tokens + known + HOST_BYTES_PER_PAGE

    @property
    def free_bytes(self) -> int:
        """Bytes of K/V in memory that no page uses."""
        return self.page_bytes * self.allocator.free_pages

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        arrays = sum(getattr(self, name).nbytes for name in self.new_page)
        return self.allocator.refcount.nbytes + arrays + sum(each.host_bytes for each in self._kept_beside())

    def _grow(self, extra: int) -> None:
        self._resize(self.capacity + extra, np.arange(self.capacity))

    def _resize(self, pages: int, kept: PageIds) -> None:
        """Have so many pages: those `kept` `(n,)`, ascending, as pages `0..n-1`, then free ones.

        Whatever may fail for want of memory comes before anything changes.
        """
        first = len(kept)
        index = first if first == 0 or kept[-1] == first - 1 else self.index(kept)
        tokens = [resized(tensor, pages, 1, index) for tensor in self._page_tensors()]
        positions, experts = (resized(each, pages, 0, index) for each in (self.positions, self.experts))
        positions[first:], experts[first:] = -1, -1
        beside = {name: each.resized(pages, kept, index) for name in self.noted if (each := getattr(self, name))}
        arrays = {}
        for name, entry in self.new_page.items():
            new = np.full((pages - first, *np.shape(entry)), entry, dtype=entry.dtype)
            arrays[name] = np.append(getattr(self, name)[kept], new, axis=0)
        while self._followers:
            self._followers.pop().drop()
        if tokens:
            self._replace_tokens(tokens)
        self.positions, self.experts = positions, experts
        for name, new in (arrays | beside).items():
            setattr(self, name, new)
        self._resize_beside(pages, kept)

    def _resize_beside(self, pages: int, kept: PageIds) -> None:
        """Follow :meth:`_resize` with what is kept elsewhere by page number; this does not fail."""
        self.allocator.resize(pages, kept)

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` can be allocated without growing. Out of memory leaves the pool as it was.

        Raises
        ------
        NoRoomError
            If the pool would have to grow beyond what `growth_limit` says.
        """
        missing = pages - self.allocator.free_pages
        if missing > 0:
            # Later reservations leave room for what follows.
            extra = max(missing, growth_of(self.capacity, self.growth))
            if self.growth_limit is not None:
                most = max(0, self.growth_limit() // self.full_page_bytes)
                if missing > most:
                    raise NoRoomError(self, missing - most)
                extra = min(extra, most)
            self._grow(extra)

    def compact(self) -> PageIds | None:
        """Give back all free pages: those in use move together, in the order of their numbers.

        Not while a transaction runs. Out of memory leaves the pool as it was.

        Returns `(N,)` int64, the new number of each page in use by its old one, or None if pages keep their numbers.
        """
        return self._compact(0)

    def give_back(self, rows: int) -> PageIds | None:
        """Give back free pages if :func:`kept_free` has them too many; return what :meth:`compact` does."""
        used = int(np.count_nonzero(self.allocator.refcount))
        return self._compact(kept_free(used, self.capacity - used, rows, self.growth))

    def _compact(self, spare: int) -> PageIds | None:
        assert not self._transactions, "pages that a transaction may want back keep their numbers"
        used = np.flatnonzero(self.allocator.refcount)
        if (pages := len(used) + spare) >= (before := self.capacity):
            return None
        self._resize(pages, used)
        number = np.full(before, -1, dtype=np.int64)
        number[used] = np.arange(len(used))
        return number

    # Pages and those who refer to them

    def allocate(self, pages: int, after: int = -1, shard: int = -1, holders: int = 1) -> PageIds:
        """Take free pages, without tokens; see :meth:`PageAllocator.allocate`.

        Parameters
        ----------
        pages, after, holders : int
            How many, a page to be next to, and their reference count.
        shard : int
            The shard they will belong to, -1 for the window.

        Returns
        -------
        numpy.ndarray
            `(pages,)` int64 page numbers.
        """
        self.reserve(pages)
        ids = self.allocator.allocate(pages, after, holders)
        self.count[ids] = 0
        self.shard[ids] = shard
        self.clear_free(ids)
        for each in self._kept_beside():
            each.reset(ids)
        self.used[ids] = True
        return ids

    def incref(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        self.allocator.incref(ids)

    def decref(self, ids: PageIds) -> None:
        """Drop a reference to each page; pages without one are free and hold no tokens."""
        self.count[self.allocator.decref(ids)] = 0

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1."""
        new = int(self.allocate(1, shard=int(self.shard[page]))[0])
        for tensor in self._page_tensors():
            tensor[:, new].copy_(tensor[:, page])
        self.positions[new], self.experts[new] = self.positions[page], self.experts[page]
        self.count[new] = self.count[page]
        for each in self._kept_beside():
            each.copy(page, new)
        return new

    def copy_on_write(self, page: int, holders: int) -> int:
        """Return a page with this one's content to which only `holders` sequences refer; they swap it for theirs."""
        if self.allocator.refcount[page] == holders:
            return page
        copy = self.copy_page(page)
        self.allocator.hand_over(page, copy, holders)
        return copy

    def clear_free(self, ids: PageIds) -> None:
        """Clear what earlier tokens left in free pages; floating-point K/V too, since a masked NaN is a NaN."""
        stale = ids[self.used[ids]]
        if len(stale):
            index = self.index(stale)
            self.positions.index_fill_(0, index, -1)
            self.experts.index_fill_(0, index, -1)
            for tensor in self._page_tensors():
                if tensor.is_floating_point():
                    tensor.index_fill_(1, index, 0)

    def wipe(self, ids: PageIds) -> None:
        """Forget the tokens of pages `(n,)` beyond their counts; within a transaction, which can undo it."""
        assert self._transactions
        self._forget_keys(ids)
        index = self.index(ids)
        positions, experts = self.positions[index], self.experts[index]
        beyond = self._beyond(ids)
        kept, kept_experts = positions.masked_fill(beyond, -1), experts.masked_fill(beyond[:, : experts.shape[1]], -1)
        self._wiped.append((index, positions, experts))
        self.positions.index_copy_(0, index, kept)
        self.experts.index_copy_(0, index, kept_experts)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of tokens, references and statistics if the block raises.

        K/V need no undo: a block only writes to slots that no count covered at its start.
        """
        before = {name: getattr(self, name).copy() for name in self.undone}
        usage, wiped = None if self.usage is None else self.usage.snapshot(), len(self._wiped)
        self._transactions += 1
        try:
            with self.allocator.transaction():
                try:
                    yield
                except BaseException:
                    for name, array in before.items():
                        now = getattr(self, name)
                        now[: len(array)], now[len(array) :] = array, self.new_page[name]
                    self._undo_on_device(usage, wiped)
                    raise
        finally:
            self._transactions -= 1
            if not self._transactions:
                self._wiped.clear()

    def _undo_on_device(self, usage: tuple[torch.Tensor, torch.Tensor] | None, wiped: int) -> None:
        """Bring statistics back, positions and experts to what the counts say, and those that were wiped after."""
        if usage is not None and self.usage is not None:
            self.usage.restore(usage)
        beyond = self._beyond(np.arange(self.capacity))
        self.positions.masked_fill_(beyond, -1)
        self.experts.masked_fill_(beyond[:, : self.experts.shape[1]], -1)
        for index, positions, experts in reversed(self._wiped[wiped:]):
            self.positions.index_copy_(0, index, positions)
            self.experts.index_copy_(0, index, experts)
        del self._wiped[wiped:]

    def _beyond(self, ids: PageIds) -> torch.Tensor:
        """Return `(n, P)` bool, the slots of pages beyond their counts."""
        return torch.arange(self.page_size, device=self.device) >= self.index(self.count[ids])[:, None]
