"""Page tables: the rows of one layer's cache, shared copy-on-write."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..common.kv import KV
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.tokens import TokenBatch
from ..pages.types import PageIds
from ..tiers.tiered_pool import TieredPool
from .full_page_index import FullPageIndex
from .layer_pools import LayerPools
from .read_plan import MIN_RUN_BYTES, ReadPlan, make_plan
from .sequence_pages import Region, SequencePages
from .sequence_writer import SequenceWriter


class PageTable:
    """The rows of one layer's cache over its pages.

    Rows with the same tokens share one :class:`SequencePages`; sequences with a common past share its pages.

    Parameters
    ----------
    writer : SequenceWriter
        Adds and removes tokens; tables made by :meth:`fork` share it and its pages.
    batch : int
        Rows.
    """

    def __init__(self, writer: SequenceWriter, batch: int) -> None:
        self.writer = writer
        self.rows = [SequencePages.empty(writer.num_shards)] * batch
        # Whether packing failed, for want of memory: it is tried again.
        self._packing_due = False
        self._changed()
        # Dropping a fork must give its pages back to the pools it shares.
        weakref.finalize(self, _release_rows, self.pools, self.rows).atexit = False

    @classmethod
    def from_rows(cls, writer: SequenceWriter, rows: list[SequencePages]) -> "PageTable":
        """Return a table of these rows, whose pages count them as holders already."""
        table = cls(writer, len(rows))
        table.rows[:] = rows
        return table

    @property
    def pools(self) -> LayerPools:
        """All pools of the layer."""
        return self.writer.pools

    @property
    def plain(self) -> PlainPool:
        """The pool of pages that keep tokens as they came, the window among them."""
        return self.writer.plain

    @property
    def num_shards(self) -> int:
        """Shards per layer."""
        return self.writer.num_shards

    @property
    def host_bytes(self) -> int:
        """Bytes of the page numbers."""
        return sum(s.pages(name).nbytes for s in self.sequences() for name in self.pools.by_id())

    def _changed(self) -> None:
        self._plans: dict[PoolId | Region, tuple[ReadPlan, int]] = {}
        self._entries: dict[PoolId | Region, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cursor: tuple[PageIds, PageIds, int] | None = None
        self._index: FullPageIndex | None = None

    def sequences(self) -> list[SequencePages]:
        """Return the distinct sequences, in order of their first row."""
        return list({id(row): row for row in self.rows}.values())

    def _replace(self, new: dict[int, SequencePages]) -> None:
        self.rows[:] = [new[id(row)] for row in self.rows]
        self._changed()

    def fork(self) -> "PageTable":
        """Return a table with the same rows; pages are shared until either side writes to them."""
        # A cursor is a licence to write to pages that nobody else holds.
        self._changed()
        twin = PageTable(self.writer, len(self.rows))
        copies = {id(sequence): sequence.copy() for sequence in self.sequences()}
        for sequence in copies.values():
            self.pools.incref(sequence)
        twin.rows[:] = [copies[id(row)] for row in self.rows]
        return twin

    def select_rows(self, indices: Sequence[int]) -> None:
        """Replace the rows by those at `indices` (which may repeat or leave out rows). Copies no token."""
        rows = [self.rows[index] for index in indices]
        kept = {id(row) for row in rows}
        for sequence in self.sequences():
            if id(sequence) not in kept:
                self.pools.decref(sequence)
        self.rows[:] = rows
        self._changed()

    def tokens(self) -> list[int]:
        """Return the number of tokens that each row holds."""
        pools = self.pools.by_id().items()
        return [sum(int(pool.count[row.pages(name)].sum()) for name, pool in pools) for row in self.rows]

    def distinct_pages(self, pool: PoolId = PLAIN) -> PageIds:
        """Return the page numbers of a pool that any row holds, sorted."""
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(s.pages(pool) for s in self.sequences())]))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of rows, counts and references if the block raises."""
        copies = {id(sequence): sequence.copy() for sequence in self.sequences()}
        before = [copies[id(row)] for row in self.rows]
        try:
            with self.pools.transaction():
                yield
        except BaseException:
            self.rows[:] = before
            self._changed()
            raise

    # Adding and removing tokens

    def next_slots(self) -> PageIds:
        """Take one new window slot per row, for one decoding step.

        Returns
        -------
        numpy.ndarray
            `(B,)` int64 slots. Rows that shared a sequence part ways here.
        """
        if self._cursor is None or self._cursor[2] == 0:
            with self.plain.transaction():
                rows = self._part(list(range(len(self.rows))))
                full = [row for row in rows if not self.writer.has_room(row)]
                self.plain.reserve(len(full))
                for row in full:
                    self.writer.make_room(row)
            self.rows[:] = rows
            self._changed()
            pages = np.array([row.window[-1] for row in rows], dtype=np.int64)
            counts = self.plain.count[pages].astype(np.int64)
            self._cursor = pages, pages * self.plain.page_size + counts, int(self.plain.page_size - counts.max())
        pages, slots, room = self._cursor
        self._cursor = pages, slots + 1, room - 1
        self.plain.count[pages] += 1
        return slots

    def _part(self, leaders: list[int]) -> list[SequencePages]:
        """Give each group of rows a sequence of its own; `leaders[row]` names the first row of its group."""
        taken: set[int] = set()
        parted: dict[int, SequencePages] = {}
        for leader in dict.fromkeys(leaders):
            sequence = self.rows[leader]
            if id(sequence) in taken:
                sequence = sequence.copy()
                self.pools.incref(sequence)
            taken.add(id(sequence))
            parted[leader] = sequence
        return [parted[leader] for leader in leaders]

    def append(
        self,
        tokens: TokenBatch,
        valid: torch.Tensor | None,
        leaders: list[int] | None = None,
    ) -> None:
        """Append the tokens of a prompt, a chunk or a draft.

        Parameters
        ----------
        tokens : TokenBatch
            Q tokens of each of the B rows.
        valid : torch.Tensor, optional
            `(B, Q)` bool, False for padding, which is not stored.
        leaders : list of int, optional
            What :meth:`identical_rows` says of them, if that is known.
        """
        leaders = self.identical_rows(tokens, valid) if leaders is None else leaders
        new = {row: tokens.row(row) for row in set(leaders)}
        if valid is not None:
            new = {row: mine.pick(valid[row].nonzero().squeeze(1)) for row, mine in new.items()}
        with self.pools.transaction():
            parted = self._part(leaders)
            # Copies take over the references: should anything fail, the rows are as they were.
            copies = {id(row): row.copy() for row in parted}
            rows = [copies[id(row)] for row in parted]
            shards = {row: self.writer.shards(mine.positions, mine.experts) for row, mine in new.items()}
            self.plain.reserve(sum(self.writer.pages_needed(rows[row], shards[row]) for row in new))
            self.pools.reserve_packed(sum(self.writer.pages_filled(rows[row], shards[row]) for row in new))
            for row, mine in new.items():
                self.writer.append(rows[row], shards[row], mine)
            self.pools.pack_full(list(copies.values()))
        self.rows[:] = rows
        self._changed()

    def identical_rows(self, tokens: TokenBatch, valid: torch.Tensor | None) -> list[int]:
        """Return for each row the first row with the same past and the same new tokens.

        `generate(num_beams=n)` repeats its inputs before the prompt is run, so n rows of one prompt arrive as n equal
        blocks of K/V. Comparing the last token of all rows first makes the usual answer, no, almost free.
        """
        keys, values = tokens.keys, tokens.values
        last = keys[:, :, -1].flatten(1)
        maybe = (last[:, None] == last).all(dim=-1).tolist()
        leaders = list(range(len(self.rows)))
        for row in range(1, len(self.rows)):
            for other in dict.fromkeys(leaders[:row]):
                if (
                    maybe[row][other]
                    and self.rows[row] is self.rows[other]
                    and (valid is None or torch.equal(valid[row], valid[other]))
                    and torch.equal(keys[row], keys[other])
                    and torch.equal(values[row], values[other])
                ):
                    leaders[row] = other
                    break
        return leaders

    def compact(self, of: PoolId) -> None:
        """Give back the free pages of a pool, as far as pages that nobody else holds can take their place."""
        pool = self.pools.by_id()[of]
        if isinstance(pool, TieredPool):
            return
        own = np.zeros(pool.capacity, dtype=np.int64)
        sequences = self.sequences()
        for sequence in sequences:
            own[sequence.pages(of)] += 1
        used = int(np.count_nonzero(pool.allocator.refcount))
        beyond = np.arange(used, pool.capacity)
        moving = beyond[(own[beyond] > 0) & (own[beyond] == pool.allocator.refcount[beyond])]
        targets = np.flatnonzero(pool.allocator.refcount[:used] == 0)[: len(moving)]
        moving = moving[: len(targets)]
        if len(moving):
            pool.move_pages(moving, targets)
            number = np.arange(pool.capacity)
            number[moving] = targets
            for sequence in sequences:
                sequence.renumber(of, number)
            self._changed()
        pool.trim()

    @property
    def is_at_page_end(self) -> bool:
        """Whether :meth:`next_slots` would need new pages, or look for them."""
        return self._cursor is None or self._cursor[2] == 0

    def drop(self, sequence: SequencePages, pool: PoolId, pages: PageIds) -> None:
        """Take pages of a shard from a sequence, which may be several rows'; nobody else loses them."""
        if pool != PLAIN:
            own = sequence.pages(pool)
            sequence.packed = {**sequence.packed, pool: own[~np.isin(own, pages)]}
        else:
            sequence.full = sequence.full[~np.isin(sequence.full, pages)]
            sequence.open = np.where(np.isin(sequence.open, pages), -1, sequence.open)
        self.pools.by_id()[pool].decref(pages)
        self._changed()

    def add(self, sequence: SequencePages, pool: PoolId, pages: PageIds) -> None:
        """Give full pages of a shard to a sequence, which may be several rows'."""
        if pool != PLAIN:
            self.pools.give(sequence, pool, pages)
        else:
            sequence.full = np.append(sequence.full, pages)
            self.plain.incref(pages)
        self._changed()

    @property
    def is_ripe(self) -> bool:
        """Whether :meth:`flush` has anything to do."""
        return self._packing_due or any(map(self.writer.is_ripe, self.sequences()))

    def flush(self) -> bool:
        """Move every page that has left the recent window to the shards, once for all rows that share it.

        Returns whether any had, or had still to be packed.
        """
        writer = self.writer
        ripe = [sequence for sequence in self.sequences() if writer.is_ripe(sequence)]
        moved = bool(ripe) or self._packing_due
        while ripe:
            groups: dict[tuple[int, bytes], list[SequencePages]] = defaultdict(list)
            for sequence in ripe:
                groups[sequence.window[writer.sink_pages], sequence.open.tobytes()].append(sequence)
            shards = {key: writer.page_shards(key[0]) for key in groups}
            needed = [writer.shard_pages_needed(g[0], len(g), shards[key]) for key, g in groups.items()]
            self.plain.reserve(sum(needed))
            # Once, however the rows that share a page go on: in all parts of a layer it is counted alike.
            for page_shards in {key[0]: shards[key] for key in groups}.values():
                writer.note(page_shards)
            for key, group in groups.items():
                writer.flush_page(group, shards[key])
            self._changed()
            ripe = [sequence for sequence in ripe if writer.is_ripe(sequence)]
        if moved:
            self._packing_due = True
            self.pools.pack_full(self.sequences())
            self._packing_due = False
        return moved

    def crop(self, length: int) -> None:
        """Forget every token at position `length` or later."""
        self.reserve_crop(length)
        with self.pools.transaction():
            # Copying a page that a slower tier has may fail.
            cropped = self.cropped(length)
        self.finish_crop(cropped, length)

    def reserve_crop(self, length: int) -> None:
        """Make room for the copies that :meth:`crop` needs of pages that others hold too."""
        for name, pool in self.pools.by_id().items():
            pool.reserve(sum(self.writer.copies_needed(sequence, length, name) for sequence in self.sequences()))

    def cropped(self, length: int) -> dict[int, SequencePages]:
        """Return by identity what is left of each sequence, in a transaction: it takes over the references."""
        return {id(sequence): self.writer.cropped(sequence, length) for sequence in self.sequences()}

    def finish_crop(self, cropped: dict[int, SequencePages], length: int) -> None:
        """Replace the sequences by what :meth:`cropped` has left of them, which cannot be undone."""
        for sequence in cropped.values():
            self.writer.wipe_cut(sequence, length)
        self._replace(cropped)

    # Reading

    def plan(self, of: PoolId | Region = PLAIN) -> ReadPlan:
        """Return how attention reads this table's pages of a pool, or some of the plain one's.

        It is made anew only after pages changed hands. A part that does not read its window has it only in
        :attr:`Region.WINDOW`.
        """
        pool = self.pool_of(of)
        plan, made_at = self._plans.get(of, (None, -1))
        if plan is None or (len(plan.bridged) and made_at != pool.allocator.allocations):
            members: dict[int, list[int]] = defaultdict(list)
            for index, row in enumerate(self.rows):
                members[id(row)].append(index)
            pages = [self._pages_of(sequence, of) for sequence in self.sequences()]
            # Pages that may move are never read as neighbours.
            movable = isinstance(pool, TieredPool)
            min_run = pool.capacity + 1 if movable else max(2, MIN_RUN_BYTES // pool.page_bytes)
            free = pool.allocator.refcount == 0
            plan = make_plan(pages, list(members.values()), free, pool.count, pool.page_size, min_run)
            # The free pages that a run reads past must stay free and clean; another fork may allocate them.
            pool.clear_free(plan.bridged)
            self._plans[of] = plan, pool.allocator.allocations
        return plan

    def pool_of(self, of: PoolId | Region) -> PagePool:
        """Return the pool that is meant, or that a region is of."""
        return self.plain if isinstance(of, Region) else self.pools.by_id()[of]

    def entries(self, of: PoolId | Region) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pages of a pool by row, for kernels that look pages up. See :meth:`plan`.

        Returns
        -------
        tuple of torch.Tensor
            `(B, n)` int32 page numbers and `(B,)` int32, how many of them count.
        """
        if of not in self._entries:
            rows = [self._pages_of(row, of) for row in self.rows]
            lengths = np.array([len(row) for row in rows], dtype=np.int32)
            numbers = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int32)
            for line, row in zip(numbers, rows, strict=True):
                line[: len(row)] = row
            device = self.plain.device
            self._entries[of] = torch.from_numpy(numbers).to(device), torch.from_numpy(lengths).to(device)
        return self._entries[of]

    def index(self) -> FullPageIndex:
        """Return the full pages of the rows, for routing; made anew only after pages changed hands."""
        if self._index is None:
            self._index = FullPageIndex.of(self.rows, self.pools.by_id())
        return self._index

    def dense(self, length: int, pools: Iterable[PoolId] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K/V by position, `(B, H, length, D)` and `(B, H, length, Dv)`; zeros where nothing is stored.

        `pools` are those to read, by default all.
        """
        return self.dense_part(length, True, pools), self.dense_part(length, False, pools)

    def dense_part(self, length: int, keys: bool, pools: Iterable[PoolId] | None = None) -> torch.Tensor:
        """Return only the keys, or only the values, of :meth:`dense`."""
        plain = self.plain.keys if keys else self.plain.values
        part = plain.new_zeros((len(self.rows), plain.shape[0], length, plain.shape[-1]))
        for row, pool, ids in self._read(pools):
            positions = pool.positions[ids].view(-1)
            held = (positions >= 0).nonzero().squeeze(1)
            tokens = pool.decoded(ids, KV.KEYS if keys else KV.VALUES).index_select(1, held)
            part[row].index_copy_(1, positions[held].long(), tokens)
        return part

    def stored_mask(self, length: int, pools: Iterable[PoolId] | None = None) -> torch.Tensor:
        """Return `(B, length)` bool, at which positions the rows hold a token in these pools, by default in any."""
        held = torch.zeros((len(self.rows), length), dtype=torch.bool, device=self.plain.device)
        for row, pool, ids in self._read(pools):
            positions = pool.positions[ids]
            held[row, positions[positions >= 0].long()] = True
        return held

    @property
    def always_read(self) -> int:
        """Pages that a step reads whatever routing says, over all rows."""
        return sum(len(self._pages_of(row, Region.UNFILLED)) for row in self.rows)

    def _pages_of(self, sequence: SequencePages, of: PoolId | Region) -> PageIds:
        """Return the pages of a sequence that attention reads; see :meth:`plan`."""
        if of is Region.WINDOW:
            return np.asarray(sequence.window, dtype=np.int64)
        pages = sequence.unfilled() if isinstance(of, Region) else sequence.pages(of)
        # The window's come first in both.
        in_plain = isinstance(of, Region) or of == PLAIN
        return pages[len(sequence.window) :] if in_plain and not self.writer.reads_window else pages

    def _read(self, pools: Iterable[PoolId] | None) -> Iterator[tuple[int, PagePool, torch.Tensor]]:
        """Yield each row's pages `(n,)` in each of the pools."""
        known = self.pools.by_id()
        for of in known if pools is None else pools:
            if (pool := known.get(of)) is not None:
                for row, sequence in enumerate(self.rows):
                    if len(pages := self._pages_of(sequence, of)):
                        yield row, pool, pool.index(pages)


def _release_rows(pages: LayerPools, rows: list[SequencePages]) -> None:
    for sequence in {id(row): row for row in rows}.values():
        pages.decref(sequence)
