"""What is kept of the pages of a pool: arrays with an entry per page, which grow, shrink and move together."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from .key_bounds import KeyBounds
from .types import PageIds
from .usage_counters import UsageCounters

# The most that the host keeps of a page: counts, errors, and its number in a table.
PAGE_NOTES = 48


class PageStorage(ABC):
    """The tokens of the pages of one layer on one device, and what is known of them; a subclass keeps their K/V.

    A page holds up to `page_size` tokens of one sequence, of all KV heads, in order of position. Page numbers stay
    valid when the arrays grow.

    Parameters
    ----------
    page_size : int
        Tokens per page.
    device : torch.device
        Where the pages live.
    keeps_experts : bool
        Whether tokens may still move to the shards of their experts.

    Attributes
    ----------
    positions : torch.Tensor
        `(N, P)` int32, -1 in empty slots.
    experts : torch.Tensor
        `(N, P)` int16, the token's primary expert, -1 where unknown; `(N, 0)` where it is not kept.
    refcount, count, shard, used : numpy.ndarray
        `(N,)` int32 / int16 / int16 / bool: sequences that hold the page (0: free), tokens in it, its shard
        (-1: window), whether it ever held tokens.
    in_place : bool
        Whether the K/V of a page lie at its number in :meth:`token_tensors`, neighbours beside each other.
    bounds, usage : KeyBounds, UsageCounters, optional
        What routing and scheduling know of the pages, where there is any.
    """

    in_place = True

    def __init__(self, page_size: int, device: torch.device, keeps_experts: bool = True) -> None:
        self.page_size = page_size
        self.device = device
        self.positions = torch.full((0, page_size), -1, dtype=torch.int32, device=device)
        self.experts = torch.full((0, page_size if keeps_experts else 0), -1, dtype=torch.int16, device=device)
        self.refcount = np.zeros(0, dtype=np.int32)
        self.count = np.zeros(0, dtype=np.int16)
        self.shard = np.zeros(0, dtype=np.int16)
        self.used = np.zeros(0, dtype=np.bool_)
        self.bounds: KeyBounds | None = None
        self.usage: UsageCounters | None = None

    # What a subclass keeps of a page: tensors with the pages along dimension 1

    @abstractmethod
    def token_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold K/V, `(H, N, ...)` each."""

    def _page_tensors(self) -> list[torch.Tensor]:
        """Return those of :meth:`token_tensors` that have an entry per page number."""
        return self.token_tensors()

    @abstractmethod
    def _replace_tokens(self, tensors: list[torch.Tensor]) -> None:
        """Take grown copies of :meth:`token_tensors`, in that order."""

    @abstractmethod
    def decoded(self, index: torch.Tensor, keys: bool) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)` in the model's dtype, `(H, n * P, D)`."""

    @abstractmethod
    def _new_bounds(self) -> KeyBounds:
        """Return the bounds of no pages."""

    # What is known of pages

    @property
    def capacity(self) -> int:
        """Pages allocated, free ones included."""
        return len(self.refcount)

    def index(self, ids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pool's device."""
        return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(self.device)

    def counts(self) -> torch.Tensor:
        """Return the tokens in each page, `(N,)` int32 on the device; stale in free pages."""
        # Always up to date in the positions, which a decoded token's slot is given when it is written.
        return (self.positions >= 0).sum(dim=1, dtype=torch.int32)

    def _notes(self) -> list[str]:
        """Return the names of the arrays with an entry per page."""
        return ["refcount", "count", "shard", "used"]

    def companions(self) -> list[KeyBounds | UsageCounters]:
        """Return what is known of the pages beyond their tokens."""
        return [companion for companion in (self.bounds, self.usage) if companion is not None]

    def watch(self, now: int) -> None:
        """Keep statistics of use from step `now` on."""
        if self.usage is None:
            self.usage = UsageCounters(self.device)
            self.usage.now = now
            self.usage.resize(self.capacity)
            self.usage.reset(np.arange(self.capacity))

    def know_bounds(self) -> None:
        """Have a place for the bounds of all pages from now on, so that their bytes count."""
        if self.bounds is None:
            self.bounds = self._new_bounds()
            self.bounds.resize(self.capacity)

    def key_bounds(self, ids: PageIds) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the keys of all pages, known at least for those at `ids`.

        Returns
        -------
        tuple of torch.Tensor
            `(H, N, D)` least values, and `(H, N, D)` largest ones or codes of the spreads above the least, as
            :func:`pikv_hf.kernels.page_scores.page_scores` takes them.
        """
        self.know_bounds()
        assert self.bounds is not None
        self.bounds.find(self, ids)
        return self.bounds.low, self.bounds.high

    # Where their K/V lie

    def frames(self, pages: torch.Tensor) -> torch.Tensor:
        """Return where the K/V of pages lie in :meth:`token_tensors`: at their numbers, in a pool without tiers."""
        return pages

    def frame_counts(self) -> torch.Tensor:
        """Return the tokens in each page by where it lies, see :meth:`frames`, int32."""
        return self.counts()

    def prefetch(self, ids: PageIds) -> None:  # noqa: B027 (only tiers have anything to do)
        """Begin to bring pages `(n,)` into fast memory; a pool without tiers has them there."""

    def tier_costs(self) -> torch.Tensor | None:
        """Return how slow each page is to reach, `(N,)` float32 from 0 (fast memory) to 1; None if all are in it."""
        return None

    # Memory

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the pool's memory."""
        beside = [tensor for companion in self.companions() for tensor in companion.tensors()]
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
        beside = [tensor for companion in self.companions() for tensor in companion.tensors()]
        known = sum(each.shape[0] * each.shape[2:].numel() * each.element_size() for each in beside)
        return self.page_bytes + tokens + known + PAGE_NOTES

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        beside = sum(companion.host_bytes for companion in self.companions())
        return self.refcount.nbytes + self.count.nbytes + self.shard.nbytes + self.used.nbytes + beside

    def _grow(self, extra: int) -> None:
        old = self.capacity
        grown = [extended(tensor, extra, 1) for tensor in self._page_tensors()]
        positions, experts = extended(self.positions, extra, 0), extended(self.experts, extra, 0)
        if grown:
            self._replace_tokens(grown)
        self.positions, self.experts = positions, experts
        self.positions[old:] = -1
        self.experts[old:] = -1
        self.refcount = np.append(self.refcount, np.zeros(extra, dtype=np.int32))
        self.count = np.append(self.count, np.zeros(extra, dtype=np.int16))
        self.shard = np.append(self.shard, np.full(extra, -1, dtype=np.int16))
        self.used = np.append(self.used, np.zeros(extra, dtype=np.bool_))
        for companion in self.companions():
            companion.resize(self.capacity)

    def _cut(self, end: int) -> None:
        """Give back the pages from number `end` on."""
        if trimmed := [tensor[:, :end].clone() for tensor in self._page_tensors()]:
            self._replace_tokens(trimmed)
        self.positions, self.experts = self.positions[:end].clone(), self.experts[:end].clone()
        for name in self._notes():
            setattr(self, name, getattr(self, name)[:end].copy())
        for companion in self.companions():
            companion.resize(end)

    # Contents

    def _move_pages(self, sources: PageIds, targets: PageIds) -> None:
        """Copy all that is known of pages `(n,)` to other numbers."""
        source, target = self.index(sources), self.index(targets)
        for tensor in self._page_tensors():
            tensor.index_copy_(1, target, tensor.index_select(1, source))
        self.positions[target], self.experts[target] = self.positions[source], self.experts[source]
        for name in self._notes():
            notes = getattr(self, name)
            notes[targets] = notes[sources]
        for companion in self.companions():
            companion.move(source, target)

    def _copy_page(self, page: int, new: int) -> None:
        """Copy what a page holds to another number."""
        for tensor in self._page_tensors():
            tensor[:, new].copy_(tensor[:, page])
        self.positions[new], self.experts[new] = self.positions[page], self.experts[page]
        self.count[new] = self.count[page]
        for companion in self.companions():
            companion.copy(page, new)

    def wipe(self, ids: PageIds) -> None:
        """Clear what earlier owners left in free pages; floating-point K/V too, since a masked NaN is a NaN."""
        stale = ids[self.used[ids]]
        if len(stale):
            index = self.index(stale)
            self.positions.index_fill_(0, index, -1)
            self.experts.index_fill_(0, index, -1)
            for tensor in self._page_tensors():
                if tensor.is_floating_point():
                    tensor.index_fill_(1, index, 0)

    def truncate(self, page: int, count: int) -> None:
        """Forget the tokens of a page beyond the first `count`."""
        self.count[page] = count
        self.positions[page, count:] = -1
        self.experts[page, count:] = -1
        if self.bounds is not None:
            # Other tokens may come in their place.
            self.bounds.reset(np.array([page]))


def extended(tensor: torch.Tensor, extra: int, dim: int) -> torch.Tensor:
    """Return a copy of a pool's tensor with `extra` more entries, zeros, along a dimension."""
    shape = list(tensor.shape)
    shape[dim] += extra
    # Zeros, not empty memory: a slot without a token is masked, and 0 * NaN would still be NaN.
    grown = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown
