"""The pool of full pages of which only some are in fast memory.

A page keeps its number for life; tables, counts and positions do not notice where its K/V are. Those in fast memory are
in frames; the others are rows of the host's memory, or records of a file.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..codecs.codec import Codec
from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import GROWTH
from ..pages.page_pool import MIN_GROWTH
from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds
from .framed_pool import FramedPool
from .lower_tiers import LowerTiers
from .page_file import PageFileError
from .page_record import RecordLayout
from .tier_limits import MIN_FRAMES, LayerTiers, TierFull

#: Pages are gathered in blocks of so many bytes, beyond what is in fast memory anyway.
STAGE_BYTES = 4 << 20


class TieredPool(FramedPool):
    """Full pages of one layer, in the tiers that the configuration names.

    Parameters
    ----------
    plain : PlainPool
        The layer's pool of pages as they came.
    key_codec, value_codec : Codec
        What the pages are encoded with.
    tiers : LayerTiers
        What the layer may take of each tier.

    Attributes
    ----------
    fetched : numpy.ndarray
        `(N,)` int64, when each page was last written or asked for, by a count of such calls.
    priority : callable, optional
        Maps page numbers `(n,)` to `(n,)` priorities of staying in fast memory, the lowest leaves first; by default
        `fetched`, which is LRU.
    """

    def __init__(self, plain: PlainPool, key_codec: Codec, value_codec: Codec, tiers: LayerTiers) -> None:
        super().__init__(plain, key_codec, value_codec)
        self.tiers = tiers
        tiers.check_device(self.device)
        layout = RecordLayout.of(f"{self.name}, pages of {self.page_size}", self.token_tensors())
        self.lower = LowerTiers(layout, tiers, self.name, self.device)
        self.fetched = np.zeros(0, dtype=np.int64)
        self.priority: Callable[[PageIds], np.ndarray] | None = None
        # Pages whose first holder has yet to come, and pages on their way out of fast memory.
        self._fresh = np.zeros(0, dtype=np.bool_)
        self._leaving = np.zeros(0, dtype=np.bool_)
        self._clock = 0
        tiers.add(self)

    # Holding pages

    def _notes(self) -> list[str]:
        return [*super()._notes(), "fetched", "_fresh", "_leaving"]

    def _grow(self, extra: int) -> None:
        super()._grow(extra)
        self.fetched = np.append(self.fetched, np.zeros(extra, dtype=np.int64))
        self._fresh = np.append(self._fresh, np.zeros(extra, dtype=np.bool_))
        self._leaving = np.append(self._leaving, np.zeros(extra, dtype=np.bool_))

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` can be allocated, in fast memory as far as there is room."""
        super().reserve(pages)
        self._reclaim()
        self._grow_frames(pages - self.free_frames)

    def trim(self) -> None:
        """Give back the free pages at the end, and all free frames."""
        self._reclaim()
        super().trim()
        if self.free_frames:
            self._set_frames(self.frames_made - self.free_frames)

    def allocate(self, pages: int, after: int = -1, shard: int = -1) -> PageIds:
        """Take free pages; see :meth:`PagePool.allocate`."""
        ids = super().allocate(pages, after, shard)
        self._drop(ids)
        return ids

    def incref(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        super().incref(ids)
        self._fresh[ids] = False

    def decref(self, ids: PageIds) -> None:
        """Drop a reference to each page; the memory of those without one is given back."""
        super().decref(ids)
        if not len(self._spared):
            self._drop(np.unique(ids[self.refcount[ids] == 0]))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of counts and references if the block raises. Where pages lie needs no undo."""
        try:
            with super().transaction():
                yield
        finally:
            self._fresh[:] = False
            self._reclaim()

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        return super().host_bytes + self.fetched.nbytes + self._fresh.nbytes + self._leaving.nbytes

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the pool's memory, fast or of the host."""
        return [*super().tensors(), *self.lower.tensors()]

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1. An error of a tier changes nothing."""
        source = self.index(np.array([page]))
        keys, values = self.codes_at(source)
        new = super().copy_page(page)
        try:
            self.put(np.array([new]), keys.tensors(), values.tensors(), self.errors[[page]])
        except BaseException:
            self.refcount[new] = self.count[new] = 0
            raise
        self._fresh[new] = False
        return new

    def put(self, ids: PageIds, keys: list[torch.Tensor], values: list[torch.Tensor], errors: np.ndarray) -> None:
        """Store encoded pages; see :meth:`PackedPool.put`. Older pages leave fast memory as far as necessary.

        Raises
        ------
        TierFull, PageFileError
            If no slower tier can take them; pages that were stored before are as they were.
        """
        self._fresh[ids] = True
        done = 0
        while done < len(ids):
            block = ids[done : done + self.most_frames()]
            rows = slice(done, done + len(block))
            self._install(block, [part[:, rows] for part in (*keys, *values)])
            done += len(block)
        self.errors[ids] = errors

    # Reading

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Bring pages into fast memory and return their frames, in the shape of `index` (int64 page numbers).

        Raises
        ------
        TierFull
            If these are more pages than fast memory has room for; see :meth:`most_frames`.
        PageFileError
            If a file does not have what was written to it.
        """
        if self.device.type == "cpu" or not self.is_all_framed():
            self.fetch(np.unique(index.cpu().numpy()))
        return self.frame_map()[index]

    def fetch(self, ids: PageIds) -> None:
        """Bring distinct pages into fast memory; see :meth:`frames`."""
        self.tiers.tiers.forward()
        missing = self._stored(ids[self.frame[ids] < 0])
        self.tiers.counters.read(len(ids) - len(missing), len(missing))
        self._touch(ids)
        if len(missing):
            order, records = self.lower.load(missing)
            self._install(order, self.lower.layout.unpack(records), keep=ids)
            self.tiers.counters.promoted += len(missing)
        self.lower.forget_prefetched()

    def codes_at(self, index: torch.Tensor, reads: bool = False) -> tuple[PageCodes, PageCodes]:
        """Return copies of the codes of keys and values of pages `(n,)`, wherever they are; none moves.

        `reads` tells that attention reads them, which is counted.
        """
        ids = index.cpu().numpy()
        held = self.frame[ids] >= 0
        # A row without pages names one that nobody may have written.
        missing = self._stored(np.unique(ids[~held]))
        if reads:
            self.tiers.counters.read(len(np.unique(ids[held])), len(missing))
        if held.all():
            frames = self.index(self.frame[ids])
            return self.keys.pick(frames), self.values.pick(frames)
        loaded = None
        if len(missing):
            order, records = self.lower.load(missing)
            loaded = order, self.lower.layout.unpack(records)
        return self._assembled(ids, loaded)

    def _stored(self, ids: PageIds) -> PageIds:
        """Return those of the pages without a frame that a slower tier has: all that anybody holds."""
        there = np.array([self.lower.tier_of(page) is not None for page in ids.tolist()], dtype=np.bool_)
        assert not self.refcount[ids[~there]].any(), "a page in use is in no tier"
        return ids[there]

    def prefetch(self, ids: PageIds) -> None:
        """Begin to read pages that are likely to be wanted next; the next :meth:`frames` takes those that are.

        Never fails: what cannot be read ahead is read when it is needed.
        """
        distinct = np.unique(ids)
        try:
            self.lower.prefetch(distinct[self.frame[distinct] < 0])
        except (PageFileError, RuntimeError, OSError):
            return

    def decoded(self, index: torch.Tensor, keys: bool) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)`, decoded into `(H, n * P, D)`."""
        codec, blocks = self.key_codec if keys else self.value_codec, []
        for block in index.split(self.block_pages()):
            codes, places = self.codes_at(block)[0 if keys else 1], torch.arange(len(block), device=self.device)
            blocks.append(self._gathered(codes, codec, places, self.counts_of(block)))
        return torch.cat(blocks, dim=1)

    def block_pages(self) -> int:
        """Return how many pages to gather at a time."""
        return max(1, STAGE_BYTES // self.page_bytes)

    def tier_costs(self) -> torch.Tensor | None:
        """Return how slow each page is to reach, `(N,)` float32: by tier, from 0 for the fastest to 1 for the last."""
        if self.is_all_framed():
            return None
        costs = (self.frame < 0).astype(np.float32)
        if "disk" in self.tiers.names and len(rows := self.lower.pages("cpu")):
            costs[rows] *= 0.5
        return torch.from_numpy(costs).to(self.device)

    # Where pages are

    def most_frames(self) -> int:
        """Return how many pages can be in fast memory at once."""
        room = self.tiers.room(self.tiers.fast) // self.page_bytes
        return max(MIN_FRAMES, self.frames_made + room)

    def can_hold(self, pages: torch.Tensor, fetched: bool = True) -> bool:
        """Return whether all of these pages are in fast memory, or can be once they are fetched."""
        if self.is_all_framed() and self.device.type != "cpu":
            # Without waiting for the device. Entries of a table that stand for no page have one of its row's.
            return True
        ids = np.unique(pages.cpu().numpy())
        missing = ids[self.frame[ids] < 0]
        if not len(missing):
            return True
        return fetched and len(ids) <= self.most_frames() and len(self._stored(missing)) == len(missing)

    def resident_share(self, more: int = 0) -> float:
        """Return the frames as a share of the pages in use, and of so many more."""
        return self.frames_made / max(1, int(np.count_nonzero(self.refcount)) + more)

    def tier_bytes(self, tier: str) -> int:
        """Return the bytes taken of a tier."""
        return self.frames_made * self.page_bytes if tier == self.tiers.fast else self.lower.nbytes(tier)

    def pages_by_tier(self) -> dict[str, int]:
        """Return the pages in use by the fastest tier that has them."""
        counts, left = {}, self.refcount > 0
        for tier in self.tiers.names:
            there = self.frame >= 0
            if tier != self.tiers.fast:
                there = np.zeros(self.capacity, dtype=np.bool_)
                there[self.lower.pages(tier)] = True
            counts[tier] = int(np.count_nonzero(left & there))
            left &= ~there
        return counts

    def _touch(self, ids: PageIds) -> None:
        self._clock += 1
        self.fetched[ids] = self._clock

    # Into fast memory and out of it

    def _install(self, ids: PageIds, parts: list[torch.Tensor], keep: PageIds | None = None) -> None:
        """Write pages, given by the parts of their codes, into frames of their own; those at `keep` stay."""
        self._occupy(ids, self._free_frames_for(len(ids), ids if keep is None else keep), parts)
        self._touch(ids)

    def _free_frames_for(self, count: int, keep: PageIds) -> np.ndarray:
        """Return free frames, made free as far as necessary."""
        if self.free_frames < count:
            self._reclaim()
            self._grow_frames(count - self.free_frames)
        if self.free_frames < count:
            self.tiers.make_room(self, count - self.free_frames)
            self._grow_frames(count - self.free_frames)
        if (short := count - self.free_frames) > 0:
            self._demote(self._victims(short, keep))
        return np.flatnonzero(self.page_of < 0)[:count]

    def _victims(self, count: int, keep: PageIds) -> PageIds:
        """Return pages to leave fast memory."""
        stays = np.zeros(self.capacity, dtype=np.bool_)
        stays[keep] = True
        pages = self.page_of[self.page_of >= 0]
        pages = pages[~stays[pages]]
        if len(pages) < count:
            limit = self.tiers.limit(self.tiers.fast)
            raise TierFull(
                f"layer {self.tiers.index}: {len(keep)} pages are wanted in tier {self.tiers.fast!r} at once, which "
                f"may hold {limit} bytes of this layer, {self.frames_made} pages of this kind"
            )
        order = self.fetched[pages] if self.priority is None else self.priority(pages)
        return pages[np.lexsort((self.fetched[pages], order))[:count]]

    def _demote(self, ids: PageIds) -> None:
        """Let slower tiers take pages. Nothing changes if they cannot."""
        self._leaving[ids] = True
        try:
            resident = (self.frame >= 0) & ~self._leaving
            self.lower.store(ids, self.shard, self._records, resident)
        finally:
            self._leaving[ids] = False
        self._vacate(ids)
        self.tiers.counters.demoted += len(ids)

    def _records(self, pages: list[int]) -> torch.Tensor:
        index = self.index(self.frame[pages])
        return self.lower.layout.pack([part.index_select(1, index) for part in self.token_tensors()])

    def _drop(self, ids: PageIds) -> None:
        """Forget the K/V of pages that are gone."""
        self._fresh[ids] = False
        self._vacate(ids)
        self.lower.drop(ids.tolist())

    def _reclaim(self) -> None:
        """Forget the K/V of pages that nobody holds, nor will after a transaction that failed."""
        gone = self._free() & ~self._fresh
        there = self.frame >= 0
        there[self.lower.pages()] = True
        self._drop(np.flatnonzero(gone & there))

    def forget_records(self) -> None:
        """Give up the records on disk of pages that are in fast memory too."""
        held = np.flatnonzero((self.frame >= 0) & ~self._leaving)
        self.lower.forget_records(held.tolist())

    def _grow_frames(self, short: int) -> None:
        """Make more frames, by at least a share of them where the limit allows."""
        if short <= 0:
            return
        room = self.tiers.room(self.tiers.fast) // self.page_bytes
        wanted = max(short, MIN_GROWTH, math.ceil(self.frames_made * GROWTH)) if self.frames_made else short
        if (extra := min(wanted, room)) > 0:
            self._add_frames(extra)

    def retire(self) -> None:
        """Leave the tiers to others; see :meth:`PackedPool.retire`."""
        self._drop(np.arange(self.capacity))
        self.refcount[:] = self.count[:] = 0
        self._set_frames(0)
        self.lower.rewrite_files()
        self.tiers.remove(self)

    def shrink(self, frames: int) -> None:
        """Keep only so many frames; pages leave as far as necessary."""
        self._reclaim()
        if (excess := self.frames_made - self.free_frames - frames) > 0:
            self._demote(self._victims(excess, np.zeros(0, dtype=np.int64)))
        self._set_frames(frames)
