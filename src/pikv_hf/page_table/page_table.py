"""Page tables: which pages hold the tokens of each row of a layer's cache; pages are shared copy-on-write."""

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..pages.pool_id import PLAIN, PoolId
from ..pages.row_slots import RowSlots
from ..pages.tokens import TokenBatch
from ..pages.types import PageIds
from .equal_rows import equal_rows
from .page_packing import pack_full, reserve_packed
from .sequence_pages import SequencePages, distinct_sequences
from .sequence_writer import SequenceWriter
from .slots import has_room, make_room, shard_pages_needed
from .table_view import TableView


@dataclasses.dataclass(slots=True)
class _NextSlots:
    """Where decoding steps write until one of the pages is full: `room` tokens of each row, in pages of its own.

    `taken` have been written to `slots`. The next `quiet` steps find that no page has left the recent window.
    """

    pages: PageIds
    slots: RowSlots
    room: int
    quiet: int
    taken: int = 0

    def take(self) -> tuple[RowSlots, int]:
        """Return the next slot of each row, behind the first."""
        offset = self.taken
        self.taken, self.room, self.quiet = offset + 1, self.room - 1, self.quiet - 1
        return self.slots, offset


class PageTable:
    """Page table of one layer: the sequence of pages of each row of the batch.

    Rows with the same tokens share one :class:`SequencePages`; sequences with a common past share its pages.

    Parameters
    ----------
    writer : SequenceWriter
        Adds and removes tokens; tables made by :meth:`fork` share it and its pages.
    batch : int
        Rows.

    Attributes
    ----------
    rows : list of SequencePages
        The pages of each row.
    pools : LayerPools
        All pools of the layer.
    plain : PlainPool
        The pool of pages that are not packed: window, open pages, and full pages that no codec took.
    """

    def __init__(self, writer: SequenceWriter, batch: int) -> None:
        self.writer = writer
        # Asked for in every step, many times.
        self.pools, self.plain = writer.pools, writer.plain
        self.rows = [SequencePages.empty(writer.num_shards)] * batch
        self._view: TableView | None = None
        self._next: _NextSlots | None = None
        # The slots of the newest tokens, and how far behind.
        self._newest: tuple[RowSlots, int] | None = None
        self._numbering = self.pools.numbering
        self.pools.holders[id(self.rows)] = self.rows
        # Dropping a fork gives its pages back to the pools it shares.
        weakref.finalize(self, self.pools.abandoned.append, self.rows).atexit = False

    @classmethod
    def from_rows(cls, writer: SequenceWriter, rows: list[SequencePages]) -> "PageTable":
        """Return a table of these rows, whose pages count them as holders already."""
        table = cls(writer, len(rows))
        table.rows[:] = rows
        return table

    @property
    def num_shards(self) -> int:
        """Shards per layer."""
        return self.writer.num_shards

    @property
    def host_bytes(self) -> int:
        """Bytes of the page numbers of all sequences."""
        return sum(s.pages(pool_id).nbytes for s in self.sequences() for pool_id in self.pools.by_id())

    def sequences(self) -> list[SequencePages]:
        """Return the distinct sequences, in order of their first row."""
        return distinct_sequences(self.rows)

    @property
    def view(self) -> TableView:
        """What attention reads of the rows. It lasts until pages change hands; then there is another one."""
        self._follow_numbering()
        if self._view is None:
            self._view = TableView(self.writer, self.rows)
        return self._view

    def _changed(self) -> None:
        self._view = self._next = None

    def _follow_numbering(self) -> None:
        """Make anew what was made of page numbers, where pages have got others since."""
        if self._numbering != self.pools.numbering:
            self._changed()
            self._numbering = self.pools.numbering
            if self._newest is not None:
                pages, counts = self._tails()
                self._newest = RowSlots(self.plain, pages * self.plain.page_size + counts - 1), 0

    def replace_sequences(self, new: dict[int, SequencePages]) -> None:
        """Replace each sequence by another, which has taken over its references, given by the old one's identity."""
        self.rows[:] = [new[id(row)] for row in self.rows]
        self._newest = None
        self._changed()

    def fork(self) -> "PageTable":
        """Return a table with the same rows; pages are shared until either side writes to them."""
        # The next slots are a licence to write to pages that nobody else holds.
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
        self._newest = None
        self._changed()

    def tokens(self) -> list[int]:
        """Return the number of tokens that each row holds."""
        pools = self.pools.by_id().items()
        return [sum(int(pool.count[row.pages(pool_id)].sum()) for pool_id, pool in pools) for row in self.rows]

    def distinct_pages(self, pool_id: PoolId = PLAIN) -> PageIds:
        """Return the page numbers of a pool that any row holds, sorted."""
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(s.pages(pool_id) for s in self.sequences())]))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of rows, counts and references if the block raises."""
        copies = {id(sequence): sequence.copy() for sequence in self.sequences()}
        before, newest = [copies[id(row)] for row in self.rows], self._newest
        try:
            with self.pools.transaction():
                yield
        except BaseException:
            self.rows[:], self._newest = before, newest
            self._changed()
            raise

    # Adding and removing tokens

    def append_newest(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Append one decoded token to each row; rows that shared a sequence part ways here.

        Parameters
        ----------
        keys, values : torch.Tensor
            `(B, H, 1, D)` and `(B, H, 1, Dv)`.
        position : int
            Of all of them.
        """
        taken = self._next
        if taken is None or not taken.room or self._numbering != self.pools.numbering:
            self._follow_numbering()
            taken = self._next = self._open_slots()
        # Counted first, so that it can be taken back wherever writing fails.
        slots, offset = self._newest = taken.take()
        self.plain.count[taken.pages] += 1
        try:
            slots.write(offset, keys, values, position)
        except BaseException:
            self.take_back_newest()
            raise

    def take_back_newest(self) -> bool:
        """Remove the tokens that :meth:`append_newest` has just appended; return whether they were still in place."""
        self._follow_numbering()
        newest, self._newest, self._next = self._newest, None, None
        if newest is not None:
            self.plain.count[self._tails()[0]] -= 1
            slots, offset = newest
            slots.empty(offset)
        return newest is not None

    def record_experts(self, experts: torch.Tensor) -> None:
        """Note the primary experts of the tokens of :meth:`append_newest`, if nothing came after them.

        `(B,)`, or one for each of as many rows that follow each other.
        """
        if self._numbering != self.pools.numbering:
            self._follow_numbering()
        if self._newest is not None:
            slots, offset = self._newest
            slots.write_experts(offset, experts)

    def _tails(self) -> tuple[PageIds, PageIds]:
        """Return the last window page of each row, `(B,)`, and the tokens in it, `(B,)` int64."""
        pages = np.array([row.window[-1] for row in self.rows], dtype=np.int64)
        return pages, self.plain.count[pages].astype(np.int64)

    def _open_slots(self) -> _NextSlots:
        """Give each row a window page of its own that has room."""
        with self.pools.transaction():
            rows = self._separate(list(range(len(self.rows))))
            full = [row for row in rows if not has_room(self.plain, row)]
            self.plain.reserve(len(full))
            for row in full:
                make_room(self.plain, row)
        self.rows[:] = rows
        self._changed()
        pages, counts = self._tails()
        size = self.plain.page_size
        room = int(size - counts.max())
        return _NextSlots(
            pages, RowSlots(self.plain, pages * size + counts), room, min(room, *map(self.writer.until_ripe, rows))
        )

    @property
    def is_at_page_end(self) -> bool:
        """Whether :meth:`append_newest` has to look for window pages with room, and may need new ones."""
        if self._numbering != self.pools.numbering:
            self._follow_numbering()
        return self._next is None or self._next.room == 0

    @property
    def is_mid_page(self) -> bool:
        """Whether :meth:`append_newest` only writes, :meth:`flush` does nothing, and there is nothing to give back."""
        pools, following = self.pools, self._next
        if following is None or following.quiet <= 0 or self._numbering != pools.numbering:
            return False
        return not (pools.abandoned or pools.freed)

    def _separate(self, leaders: list[int]) -> list[SequencePages]:
        """Give each group of rows a sequence of its own; `leaders[row]` names the first row of its group."""
        taken: set[int] = set()
        separate: dict[int, SequencePages] = {}
        for leader in dict.fromkeys(leaders):
            sequence = self.rows[leader]
            if id(sequence) in taken:
                sequence = sequence.copy()
                self.pools.incref(sequence)
            taken.add(id(sequence))
            separate[leader] = sequence
        return [separate[leader] for leader in leaders]

    def append(self, tokens: TokenBatch, valid: torch.Tensor | None, leaders: list[int] | None = None) -> None:
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
            separate = self._separate(leaders)
            # Copies take over the references: should anything fail, the rows are as they were.
            copies = {id(row): row.copy() for row in separate}
            rows = [copies[id(row)] for row in separate]
            shards = {row: self.writer.shards(mine.positions, mine.experts) for row, mine in new.items()}
            self.plain.reserve(sum(self.writer.pages_needed(rows[row], shards[row]) for row in new))
            reserve_packed(self.pools, sum(self.writer.pages_filled(rows[row], shards[row]) for row in new))
            for row, mine in new.items():
                self.writer.append(rows[row], shards[row], mine)
            pack_full(self.pools, list(copies.values()))
        self.rows[:], self._newest = rows, None
        self._changed()

    def identical_rows(self, tokens: TokenBatch, valid: torch.Tensor | None) -> list[int]:
        """Return for each row the first row with the same past and the same new tokens; see :meth:`append`."""
        past = torch.tensor([[id(row)] for row in self.rows])
        return equal_rows([past, tokens.keys[:, :, -1]], [valid, tokens.keys, tokens.values])

    def drop_pages(self, sequence: SequencePages, pool_id: PoolId, pages: PageIds) -> None:
        """Evict pages of shards from a sequence, for all rows that share it; other holders keep theirs."""
        if pool_id == PLAIN:
            sequence.full = sequence.full[~np.isin(sequence.full, pages)]
            sequence.open = np.where(np.isin(sequence.open, pages), -1, sequence.open)
        else:
            own = sequence.pages(pool_id)
            sequence.packed = {**sequence.packed, pool_id: own[~np.isin(own, pages)]}
        self.pools.by_id()[pool_id].decref(pages)
        self._changed()

    def add_pages(self, sequence: SequencePages, pool_id: PoolId, pages: PageIds) -> None:
        """Give full pages of shards to a sequence, for all rows that share it."""
        if pool_id == PLAIN:
            sequence.full = np.append(sequence.full, pages)
            self.plain.incref(pages)
        else:
            self.pools.add_packed(sequence, pool_id, pages)
        self._changed()

    @property
    def is_ripe(self) -> bool:
        """Whether :meth:`flush` has anything to do."""
        return any(map(self.writer.is_ripe, self.sequences()))

    def flush(self) -> None:
        """Move every page that has left the recent window to the shards, once for all rows that share it."""
        while ripe := [sequence for sequence in self.sequences() if self.writer.is_ripe(sequence)]:
            self._flush_oldest(ripe)
        pack_full(self.pools, self.sequences())

    def _flush_oldest(self, ripe: Sequence[SequencePages]) -> None:
        """Move the oldest page of the recent window of each of these sequences."""
        writer = self.writer
        groups: dict[tuple[int, bytes], list[SequencePages]] = defaultdict(list)
        for sequence in ripe:
            groups[sequence.window[writer.sink_pages], sequence.open.tobytes()].append(sequence)
        shards = {key: writer.page_shards(key[0]) for key in groups}
        needed = [shard_pages_needed(self.plain, group[0], len(group), shards[key]) for key, group in groups.items()]
        self.plain.reserve(sum(needed))
        # Once, however the rows that share a page go on: in all parts of a layer it is counted alike.
        for page_shards in {key[0]: shards[key] for key in groups}.values():
            writer.count_leaving(page_shards)
        for key, group in groups.items():
            writer.flush_page(group, shards[key])
        if any(len(sequence.window) <= writer.sink_pages for sequence in ripe):
            # The newest tokens have left the window with the page that they were in.
            self._newest = None
        self._changed()
