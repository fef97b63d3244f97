"""Which page of a pool lies in which frame of fast memory, and which has to leave when there are too few frames.

A frame is an entry, along dimension 1, of tensors `(H, F, ...)` that have fewer entries than the pool has pages.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..common.tensors import resized
from ..pages.packed_pool import PACKED_GROWTH
from ..pages.pool_growth import MIN_GROWTH
from ..pages.types import PageIds
from .tier_limits import MIN_FRAMES, LayerTiers, TierFull

#: Pages, and the parts of their codes `(H, m, ...)`.
Loaded = tuple[PageIds, list[torch.Tensor]]


class FrameTable:
    """Maps pages to frames and back, and knows which pages were used least lately.

    Parameters
    ----------
    tiers : LayerTiers
        What the layer may take of fast memory.
    page_bytes : int
        Of a page.
    device : torch.device
        Where attention runs.

    Attributes
    ----------
    frame_of : numpy.ndarray
        `(N,)` int64, the frame of each page, -1 where it has none.
    page_of : numpy.ndarray
        `(F,)` int64, the page in each frame, -1 where it is free.
    last_use : numpy.ndarray
        `(N,)` int64, when each page was last written or asked for, by a count of such calls.
    priority : callable, optional
        Maps page numbers `(n,)` to `(n,)` priorities of staying in fast memory, the lowest leaves first; by default
        `last_use`, which is LRU.
    """

    def __init__(self, tiers: LayerTiers, page_bytes: int, device: torch.device) -> None:
        self.tiers, self.page_bytes, self.device = tiers, page_bytes, device
        self.priority: Callable[[PageIds], np.ndarray] | None = None
        self.frame_of = np.zeros(0, dtype=np.int64)
        self.page_of = np.zeros(0, dtype=np.int64)
        self.last_use = np.zeros(0, dtype=np.int64)
        self._clock = 0
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        """Return F."""
        return len(self.page_of)

    @property
    def free(self) -> int:
        """Frames without a page."""
        return int(np.count_nonzero(self.page_of < 0))

    @property
    def most(self) -> int:
        """The frames that there may be, those that the limits leave room for included."""
        return max(MIN_FRAMES, len(self) + self._room)

    @property
    def _room(self) -> int:
        return self.tiers.room(self.tiers.fast) // self.page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.frame_of.nbytes + self.page_of.nbytes + self.last_use.nbytes

    def resize(self, pages: int, kept: PageIds) -> None:
        """Follow the pool to another number of pages, of which the first are those `kept`; others have no frame."""
        extra = pages - len(kept)
        self.frame_of = np.append(self.frame_of[kept], np.full(extra, -1, dtype=np.int64))
        self.last_use = np.append(self.last_use[kept], np.zeros(extra, dtype=np.int64))
        framed = np.flatnonzero(self.frame_of >= 0)
        self.page_of[self.frame_of[framed]] = framed
        self._on_device = None

    def on_device(self) -> torch.Tensor:
        """Return the frame of each page on the device, `(N,)` int64; any for those that have none."""
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.frame_of.clip(min=0)).to(self.device)
        return self._on_device

    def vacate(self, ids: PageIds) -> None:
        """Take pages out of the frames that they may have."""
        frames = self.frame_of[ids]
        self.page_of[frames[frames >= 0]] = -1
        self.frame_of[ids] = -1
        self._on_device = None

    def touch(self, ids: PageIds) -> None:
        """Note that pages are used now."""
        self._clock += 1
        self.last_use[ids] = self._clock

    def victims(self, count: int, keep: PageIds) -> PageIds:
        """Return pages to leave fast memory, the lowest priority first and of those the least lately used.

        Raises
        ------
        TierFull
            If there are too few beside those at `keep`, which have to stay.
        """
        stays = np.zeros(len(self.frame_of), dtype=np.bool_)
        stays[keep] = True
        pages = self.page_of[self.page_of >= 0]
        pages = pages[~stays[pages]]
        if len(pages) < count:
            limit = self.tiers.limit(self.tiers.fast)
            raise TierFull(
                f"layer {self.tiers.index}: {len(keep)} pages are wanted in tier {self.tiers.fast!r} at once, which "
                f"may hold {limit} bytes of this layer, {len(self)} pages of this kind"
            )
        order = self.last_use[pages] if self.priority is None else self.priority(pages)
        return pages[np.lexsort((self.last_use[pages], order))[:count]]

    # Tensors of frames

    def write(self, tensors: list[torch.Tensor], ids: PageIds, entries: list[torch.Tensor]) -> None:
        """Put pages `(n,)`, given by their entries `(H, n, ...)`, into free frames, of which there are as many."""
        frames = np.flatnonzero(self.page_of < 0)[: len(ids)]
        index = self._index(frames)
        for tensor, new in zip(tensors, entries, strict=True):
            tensor.index_copy_(1, index, new)
        self.frame_of[ids], self.page_of[frames] = frames, ids
        self._on_device = None
        self.touch(ids)

    def read(self, tensors: list[torch.Tensor], ids: PageIds) -> list[torch.Tensor]:
        """Return copies `(H, n, ...)` of pages that have a frame."""
        index = self._index(self.frame_of[ids])
        return [tensor.index_select(1, index) for tensor in tensors]

    def grown(self, tensors: list[torch.Tensor], short: int) -> list[torch.Tensor]:
        """Return tensors with `short` frames more, and a share of what there are, as far as the limits allow."""
        wanted = max(short, MIN_GROWTH, math.ceil(len(self) * PACKED_GROWTH)) if len(self) else short
        extra = min(wanted, self._room)
        if extra <= 0:
            return tensors
        larger = [resized(tensor, len(self) + extra, 1, len(self)) for tensor in tensors]
        self.page_of = np.append(self.page_of, np.full(extra, -1, dtype=np.int64))
        return larger

    def resized(self, tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Return tensors of `count` frames, which the pages that are in frames fit into."""
        used = np.flatnonzero(self.page_of >= 0)
        index = self._index(used)
        replaced = [resized(tensor, count, 1, index) for tensor in tensors]
        pages = self.page_of[used]
        self.page_of = np.append(pages, np.full(count - len(used), -1, dtype=np.int64))
        self.frame_of[pages] = np.arange(len(pages))
        self._on_device = None
        return replaced

    def gather(self, tensors: list[torch.Tensor], ids: PageIds, loaded: Loaded | None) -> list[torch.Tensor]:
        """Return copies `(H, n, ...)` of pages, which may repeat, from their frames or from what is loaded.

        `loaded` are distinct pages without a frame. Pages that are in neither are zeros.
        """
        here = np.flatnonzero(self.frame_of[ids] >= 0)
        frames, places = self._index(self.frame_of[ids[here]]), self._index(here)
        copies = [tensor.new_zeros((tensor.shape[0], len(ids), *tensor.shape[2:])) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.index_copy_(1, places, tensor.index_select(1, frames))
        if loaded is not None:
            source, target = _places(loaded[0], ids)
            for copy, new in zip(copies, loaded[1], strict=True):
                picked = new if source is None else new.index_select(1, self._index(source))
                copy.index_copy_(1, self._index(target), picked)
        return copies

    def _index(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self.device)


def _places(pages: PageIds, ids: PageIds) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which of distinct pages go where in `ids`; None instead of which if each goes to one place, in order."""
    order = np.argsort(pages)
    wanted = np.flatnonzero(np.isin(ids, pages))
    source = order[np.searchsorted(pages, ids[wanted], sorter=order)]
    if len(source) == len(pages):
        return None, wanted[np.argsort(source)]
    return source, wanted
