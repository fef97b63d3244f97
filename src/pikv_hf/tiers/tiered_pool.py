"""The pool of full pages of which only some are in fast memory.

Nothing else notices where a page's K/V are. Those in fast memory are in frames, others in host memory or in a file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import ClassVar

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.kv import KV
from ..kernels.page_codes import PageCodes
from ..pages.key_bounds import KeyBounds
from ..pages.packed_pool import PackedPool, bounds_of_codes
from ..pages.plain_pool import PlainPool
from ..pages.pool_growth import kept_free
from ..pages.types import PageIds
from .code_bounds import CodeBounds
from .frame_table import FrameTable
from .lower_tiers import LowerTiers
from .record_layout import RecordLayout
from .tier_limits import LayerTiers

#: Pages are gathered in blocks of so many bytes, beyond what is in fast memory anyway.
STAGE_BYTES = 4 << 20


class TieredPool(PackedPool):
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
    keys, values : PageCodes
        F frames, which are fewer than the pages.
    frames : FrameTable
        Which page lies in which frame, and which leaves first.
    lower : LowerTiers
        The pages that are not, or not only, in frames.
    """

    new_page: ClassVar[Mapping[str, np.ndarray | np.generic]] = {
        **PackedPool.new_page,
        # Pages that nobody has referred to yet, and pages on their way out of fast memory.
        "_fresh": np.bool_(False),
        "_leaving": np.bool_(False),
    }
    _fresh: np.ndarray
    _leaving: np.ndarray

    def __init__(self, plain: PlainPool, key_codec: Codec, value_codec: Codec, tiers: LayerTiers) -> None:
        super().__init__(plain, key_codec, value_codec)
        self.tiers = tiers
        tiers.check_device(self.device)
        self.frames = FrameTable(tiers, self.page_bytes, self.device)
        layout = RecordLayout.of(f"{self.name}, pages of {self.page_size}", self.token_tensors())
        self.lower = LowerTiers(layout, tiers, self.name, self.device)
        tiers.add(self)

    # Of a page as of any other pool's: all but its K/V

    def _page_tensors(self) -> list[torch.Tensor]:
        return []

    def _resize_beside(self, pages: int, kept: PageIds) -> None:
        super()._resize_beside(pages, kept)
        self.frames.resize(pages, kept)
        self.lower.renumber(kept)

    def _new_bounds(self) -> KeyBounds | None:
        if self._codes_have_bounds:
            return CodeBounds(self.keys.heads, self.key_dim, self.device)
        return super()._new_bounds()

    def _read_bounds(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._codes_have_bounds:
            return super()._read_bounds(index)
        blocks = [bounds_of_codes(self.codes_at(block)[0]) for block in index.split(self.chunk_pages())]
        floors, spreads = zip(*blocks, strict=True)
        return torch.cat(floors, dim=1), torch.cat(spreads, dim=1)

    @property
    def free_bytes(self) -> int:
        """Bytes of K/V in memory that no page uses."""
        return self.frames.free * self.page_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        return super().host_bytes + self.frames.nbytes

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the pool's memory, fast or of the host."""
        return [*super().tensors(), *self.lower.tensors()]

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` can be allocated, in fast memory as far as there is room."""
        super().reserve(pages)
        self._reclaim()
        self._grow_frames(pages)

    def compact(self) -> PageIds | None:
        """Give back all free pages and frames, and what slower tiers have for pages that are gone."""
        self._reclaim()
        self._set_frames(self.frames_made - self.frames.free)
        self.lower.compact()
        return super().compact()

    def give_back(self, rows: int) -> PageIds | None:
        """Give back free pages, frames, and what slower tiers have for pages that are gone, where that is much."""
        self._reclaim()
        used = self.frames_made - self.frames.free
        self._set_frames(used + kept_free(used, self.frames.free, rows, self.growth))
        self.lower.give_back()
        return super().give_back(rows)

    def allocate(self, pages: int, after: int = -1, shard: int = -1, holders: int = 1) -> PageIds:
        """Take free pages; see :meth:`PagePool.allocate`."""
        ids = super().allocate(pages, after, shard, holders)
        self._drop(ids)
        return ids

    def incref(self, ids: PageIds) -> None:
        """Add a reference to each page (a page number may repeat)."""
        super().incref(ids)
        self._fresh[ids] = False

    def decref(self, ids: PageIds) -> None:
        """Drop a reference to each page; the memory of those without one is given back."""
        super().decref(ids)
        if not self.allocator.spares_pages:
            self._drop(np.unique(ids[self.allocator.refcount[ids] == 0]))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See :meth:`PagePool.transaction`; where pages lie needs no undo."""
        try:
            with super().transaction():
                yield
        finally:
            self._fresh[:] = False
            self._reclaim()

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1. An error of a tier changes nothing."""
        keys, values = self.codes_at(self.index(np.array([page])))
        new = super().copy_page(page)
        try:
            self.put(np.array([new]), keys.tensors(), values.tensors(), self.errors[[page]])
        except BaseException:
            self.allocator.refcount[new] = self.count[new] = 0
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
            rows = slice(done, done + self.frames.most)
            self._install(ids[rows], [part[:, rows] for part in (*keys, *values)])
            done = rows.stop
        self.errors[ids] = errors

    # Reading

    def fetch(self, index: torch.Tensor) -> torch.Tensor:
        """Bring pages into fast memory and return their frames, in the shape of `index` (int64 page numbers).

        Raises
        ------
        TierFull
            If these are more pages than fast memory has room for; see :attr:`FrameTable.most`.
        PageFileError
            If a file does not have what was written to it.
        """
        if self.device.type == "cpu" or not self.is_all_framed():
            self._promote(np.unique(index.cpu().numpy()))
        return self.frames.on_device()[index]

    def _promote(self, ids: PageIds) -> None:
        """Bring distinct pages into fast memory; see :meth:`fetch`."""
        self.tiers.tiers.prefetch_thread.forward()
        missing = self._stored(ids[self.frames.frame_of[ids] < 0])
        self.tiers.counters.count_reads(len(ids) - len(missing), len(missing))
        self.frames.touch(ids)
        if len(missing):
            order, records = self.lower.load(missing)
            self._install(order, self.lower.layout.unpack(records), keep=ids)
            self.tiers.counters.promoted += len(missing)
        self.lower.prefetched.forget()

    def frame_counts(self) -> torch.Tensor:
        """Return the tokens in each frame, `(F,)` int32."""
        page_of = self.frames.page_of
        return self.counts_of(self.index(page_of.clip(min=0))).where(self.index(page_of) >= 0, 0)

    def counts_of(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tokens in the pages at `index` `(n,)`, `(n,)` int32."""
        return (self.positions.index_select(0, index) >= 0).sum(dim=1, dtype=torch.int32)

    def codes_at(self, index: torch.Tensor, reads: bool = False) -> tuple[PageCodes, PageCodes]:
        """Return copies of the codes of keys and values of pages `(n,)`, wherever they are; none moves.

        `reads` tells that attention reads them, which is counted.
        """
        ids = index.cpu().numpy()
        framed = self.frames.frame_of[ids] >= 0
        # A row without pages names one that nobody may have written.
        missing = self._stored(np.unique(ids[~framed]))
        if reads:
            self.tiers.counters.count_reads(len(np.unique(ids[framed])), len(missing))
        if framed.all():
            frames = self.index(self.frames.frame_of[ids])
            return self.keys.pick(frames), self.values.pick(frames)
        loaded = None
        if len(missing):
            order, records = self.lower.load(missing)
            loaded = order, self.lower.layout.unpack(records)
        parts = iter(self.frames.gather(self.token_tensors(), ids, loaded))
        return self.keys.map(lambda _: next(parts)), self.values.map(lambda _: next(parts))

    def _stored(self, ids: PageIds) -> PageIds:
        """Return those of the pages without a frame that a slower tier has: all that anybody holds."""
        there = np.array([self.lower.tier_of(page) is not None for page in ids.tolist()], dtype=np.bool_)
        assert not self.allocator.refcount[ids[~there]].any(), "a page in use is in no tier"
        return ids[there]

    def prefetch(self, ids: PageIds) -> None:
        """Begin to read pages that are likely to be wanted next; the next :meth:`fetch` takes those that are.

        Never fails: what cannot be read ahead is read when it is needed.
        """
        distinct = np.unique(ids)
        with suppress(RuntimeError, OSError):
            self.lower.prefetch(distinct[self.frames.frame_of[distinct] < 0])

    def decoded(self, index: torch.Tensor, which: KV) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)`, decoded into `(H, n * P, D)`."""
        blocks = []
        for block in index.split(self.chunk_pages()):
            keys, values = self.codes_at(block)
            entries = torch.arange(len(block), device=self.device)
            codes, codec = (keys, self.key_codec) if which is KV.KEYS else (values, self.value_codec)
            blocks.append(self._gathered(codes, codec, entries, self.counts_of(block)))
        return torch.cat(blocks, dim=1)

    def chunk_pages(self) -> int:
        """Return how many pages to gather at a time."""
        return max(1, STAGE_BYTES // self.page_bytes)

    def tier_costs(self) -> torch.Tensor | None:
        """Return how slow each page is to reach, `(N,)` float32 from 0 (fast memory) to 1; None if all are in it."""
        if self.is_all_framed():
            return None
        tier, last = self._tier_numbers(), len(self.tiers.names) - 1
        costs = np.where(tier < 0, last, tier) / max(1, last)
        return torch.from_numpy(costs.astype(np.float32)).to(self.device)

    # Where pages are

    @property
    def frames_made(self) -> int:
        """F, the pages that fast memory has room for."""
        return len(self.frames)

    def is_all_framed(self) -> bool:
        """Return whether every page in use is in fast memory."""
        return not bool(((self.frames.frame_of < 0) & (self.allocator.refcount > 0)).any())

    def can_hold(self, pages: torch.Tensor, fetched: bool = True) -> bool:
        """Return whether all of these pages are in fast memory, or can be once they are fetched."""
        if self.is_all_framed() and self.device.type != "cpu":
            # Without waiting for the device. Entries of a table that stand for no page have one of its row's.
            return True
        ids = np.unique(pages.cpu().numpy())
        missing = ids[self.frames.frame_of[ids] < 0]
        if not len(missing):
            return True
        return fetched and len(ids) <= self.frames.most and len(self._stored(missing)) == len(missing)

    def resident_share(self, more: int = 0) -> float:
        """Return the frames as a share of the pages in use, and of so many more."""
        return self.frames_made / max(1, int(np.count_nonzero(self.allocator.refcount)) + more)

    def tier_bytes(self, tier: str) -> int:
        """Return the bytes taken of a tier."""
        return self.frames_made * self.page_bytes if tier == self.tiers.fast else self.lower.nbytes(tier)

    def pages_by_tier(self) -> dict[str, int]:
        """Return the pages in use by the fastest tier that has them."""
        tier = self._tier_numbers()[self.allocator.refcount > 0]
        return {name: int(np.count_nonzero(tier == number)) for number, name in enumerate(self.tiers.names)}

    def _tier_numbers(self) -> np.ndarray:
        """Return `(N,)` int64, the fastest tier that has each page, by its place in the names; -1 if none has."""
        numbers = np.full(self.capacity, -1, dtype=np.int64)
        for number, name in reversed(list(enumerate(self.tiers.names))):
            numbers[self.lower.pages(name) if number else self.frames.frame_of >= 0] = number
        return numbers

    # Into fast memory and out of it

    def _install(self, ids: PageIds, parts: list[torch.Tensor], keep: PageIds | None = None) -> None:
        """Write pages, given by the parts of their codes, into frames of their own; those at `keep` stay."""
        self._free_frames(len(ids), ids if keep is None else keep)
        self.frames.write(self.token_tensors(), ids, parts)

    def _free_frames(self, count: int, keep: PageIds) -> None:
        """Make sure that so many frames are free; pages leave as far as necessary."""
        if self.frames.free < count:
            self._reclaim()
            self._grow_frames(count)
        if self.frames.free < count:
            self.tiers.make_room(self, count - self.frames.free)
            self._grow_frames(count)
        if (short := count - self.frames.free) > 0:
            self._demote(self.frames.victims(short, keep))

    def _grow_frames(self, count: int) -> None:
        """Make frames until `count` are free, as far as the limits allow."""
        if (short := count - self.frames.free) > 0:
            self._replace_tokens(self.frames.grown(self.token_tensors(), short))

    def _set_frames(self, count: int) -> None:
        """Keep only so many frames, which the pages that are there fit into."""
        if count != self.frames_made:
            self._replace_tokens(self.frames.resized(self.token_tensors(), count))

    def _demote(self, ids: PageIds) -> None:
        """Let slower tiers take pages. Nothing changes if they cannot."""
        self._leaving[ids] = True
        try:
            resident = (self.frames.frame_of >= 0) & ~self._leaving
            self.lower.store(ids, self.shard, self._records, resident)
        finally:
            self._leaving[ids] = False
        self.frames.vacate(ids)
        self.tiers.counters.demoted += len(ids)

    def _records(self, pages: list[int]) -> torch.Tensor:
        return self.lower.layout.pack(self.frames.read(self.token_tensors(), np.array(pages, dtype=np.int64)))

    def _drop(self, ids: PageIds) -> None:
        """Forget the K/V of pages that are gone."""
        self._fresh[ids] = False
        self.frames.vacate(ids)
        self.lower.drop(ids.tolist())

    def _reclaim(self) -> None:
        """Forget the K/V of pages that nobody holds, nor will after a transaction that failed."""
        gone = self.allocator.free_mask() & ~self._fresh
        there = self.frames.frame_of >= 0
        there[self.lower.pages()] = True
        self._drop(np.flatnonzero(gone & there))

    @property
    def dead_bytes(self) -> int:
        """Bytes on disk that belong to pages that are gone."""
        return self.lower.dead_bytes

    def free_disk(self, copies: bool) -> None:
        """Shorten files by the pages that are gone, and with `copies` by those that are in fast memory too."""
        if copies:
            self.lower.forget_records(np.flatnonzero((self.frames.frame_of >= 0) & ~self._leaving).tolist())
        self.lower.compact()

    def retire(self) -> None:
        """Give back what the pool holds of the tiers; it is not used again, though an error may still refer to it."""
        self._drop(np.arange(self.capacity))
        self.allocator.refcount[:] = self.count[:] = 0
        self._set_frames(0)
        self.lower.compact()
        self.tiers.remove(self)

    def shrink(self, frames: int) -> None:
        """Keep only so many frames; pages leave as far as necessary."""
        self._reclaim()
        if (excess := self.frames_made - self.frames.free - frames) > 0:
            self._demote(self.frames.victims(excess, np.zeros(0, dtype=np.int64)))
        self._set_frames(frames)
