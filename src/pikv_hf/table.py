"""Page tables: which pages each sequence of a layer holds, shared copy-on-write."""

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .pages import PageIds, PagePool

# Maps (positions, experts) of tokens, int32 and int16 `(n,)`, to their shards.
ShardOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(slots=True, eq=False)
class SequencePages:
    """The pages of one sequence. Rows of a table that hold the same tokens share one object.

    Attributes
    ----------
    window : list of int
        Sink pages, then the pages of the recent tokens, in time order; all full but the last.
    open : numpy.ndarray
        `(S,)` int64, the partly filled page of each shard, -1 if it has none.
    sealed : numpy.ndarray
        `(n,)` int64, full pages of all shards in order of sealing.
    """

    window: list[int]
    open: PageIds
    sealed: PageIds

    def pages(self) -> PageIds:
        """Return all page numbers."""
        return np.concatenate([np.asarray(self.window, dtype=np.int64), self.open[self.open >= 0], self.sealed])

    def copy(self) -> "SequencePages":
        """Return an independent table row; the caller adds the references."""
        return SequencePages(list(self.window), self.open.copy(), self.sealed)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages `start..stop-1` held by exactly the rows `rows`: read in place, once for all of them."""

    start: int
    stop: int
    rows: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPlan:
    """How attention reads a table: long runs in place, the remaining pages of each row gathered.

    Attributes
    ----------
    runs : list of Run
        At least `MIN_RUN` pages each.
    scattered : numpy.ndarray
        `(B, n)` int64; shorter rows are filled up with pages of their own beyond `lengths`.
    lengths : numpy.ndarray
        `(B,)` int64, scattered pages of each row.
    """

    runs: list[Run]
    scattered: PageIds
    lengths: PageIds


# Shorter runs are cheaper gathered together than read one matmul at a time.
MIN_RUN = 8


def _release_rows(pool: PagePool, rows: list[SequencePages]) -> None:
    for sequence in {id(row): row for row in rows}.values():
        pool.release(sequence.pages())


class PageTable:
    """The rows of one layer's cache over a page pool.

    Tokens enter a sequence's window; whole pages leave it, oldest first, once `recent_window` newer tokens are there,
    and their tokens move to the open pages of their shards. Pages held by several sequences are never written to:
    a sequence copies such a page first.

    Parameters
    ----------
    pool : PagePool
        Where pages come from; tables made by :meth:`fork` share it.
    batch : int
        Rows.
    num_shards, recent_window, sink_tokens : int
        As in :class:`~pikv_hf.PiKVConfig`.
    shard_of : callable
        Maps `(positions, experts)` of tokens to shards.
    """

    def __init__(
        self, pool: PagePool, batch: int, num_shards: int, recent_window: int, sink_tokens: int, shard_of: ShardOf
    ) -> None:
        self.pool = pool
        self.num_shards = num_shards
        self.recent_window = recent_window
        self.sink_pages = -(-sink_tokens // pool.page_size)
        self.shard_of = shard_of
        empty = SequencePages([], np.full(num_shards, -1, dtype=np.int64), np.zeros(0, dtype=np.int64))
        self.rows = [empty] * batch
        self._changed()
        # Dropping a fork must give its pages back to the pool it shares.
        weakref.finalize(self, _release_rows, pool, self.rows).atexit = False

    def _changed(self) -> None:
        self._plan: ReadPlan | None = None
        self._cursor: tuple[PageIds, PageIds, int] | None = None

    def fork(self) -> "PageTable":
        """Return a table with the same rows; pages are shared until either side writes to them."""
        self._changed()
        twin = PageTable.__new__(PageTable)
        twin.pool, twin.num_shards, twin.shard_of = self.pool, self.num_shards, self.shard_of
        twin.recent_window, twin.sink_pages = self.recent_window, self.sink_pages
        copies = {id(row): row.copy() for row in self.rows}
        twin.rows = [copies[id(row)] for row in self.rows]
        for sequence in copies.values():
            self.pool.hold(sequence.pages())
        twin._changed()
        weakref.finalize(twin, _release_rows, twin.pool, twin.rows).atexit = False
        return twin

    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows by those at `indices` (which may repeat or leave out rows). Copies no token."""
        rows = [self.rows[index] for index in indices]
        kept = {id(row) for row in rows}
        for sequence in {id(row): row for row in self.rows if id(row) not in kept}.values():
            self.pool.release(sequence.pages())
        self.rows[:] = rows
        self._changed()

    def tokens(self) -> list[int]:
        """Return the number of tokens that each row holds."""
        counts = {id(row): int(self.pool.count[row.pages()].sum()) for row in self.rows}
        return [counts[id(row)] for row in self.rows]

    def distinct_pages(self) -> PageIds:
        """Return the page numbers held by any row, sorted."""
        return np.unique(np.concatenate([row.pages() for row in {id(row): row for row in self.rows}.values()]))

    @property
    def host_bytes(self) -> int:
        """Bytes of the page numbers."""
        return sum(row.pages().nbytes for row in {id(row): row for row in self.rows}.values())

    # Adding tokens

    def next_slots(self) -> PageIds:
        """Take one new window slot per row, for one decoding step.

        Returns
        -------
        numpy.ndarray
            `(B,)` int64 slots. Rows that shared a sequence part ways here.
        """
        if self._cursor is None or self._cursor[2] == 0:
            with self.pool.transaction():
                rows = self._part(list(range(len(self.rows))))
                needy = [row for row in rows if not self._has_room(row)]
                self.pool.reserve(len(needy))
                for row in needy:
                    self._make_room(row)
            self.rows[:] = rows
            self._changed()
            pages = np.array([row.window[-1] for row in rows], dtype=np.int64)
            counts = self.pool.count[pages].astype(np.int64)
            self._cursor = pages, pages * self.pool.page_size + counts, int(self.pool.page_size - counts.max())
        pages, slots, room = self._cursor
        self._cursor = pages, slots + 1, room - 1
        self.pool.count[pages] += 1
        return slots

    def _part(self, leaders: list[int]) -> list[SequencePages]:
        """Give each group of rows a sequence of its own; `leaders[row]` names the first row of its group."""
        owners: dict[int, int] = {}
        parted: dict[int, SequencePages] = {}
        for leader in dict.fromkeys(leaders):
            sequence = self.rows[leader]
            if id(sequence) in owners:
                sequence = sequence.copy()
                self.pool.hold(sequence.pages())
            owners[id(sequence)] = leader
            parted[leader] = sequence
        return [parted[leader] for leader in leaders]

    def _has_room(self, sequence: SequencePages) -> bool:
        if not sequence.window:
            return False
        tail = sequence.window[-1]
        return bool(self.pool.count[tail] < self.pool.page_size and self.pool.refcount[tail] == 1)

    def _make_room(self, sequence: SequencePages) -> None:
        """Give a sequence a window page that it alone may write to."""
        tail = sequence.window[-1] if sequence.window else -1
        if tail >= 0 and self.pool.count[tail] < self.pool.page_size:
            sequence.window[-1] = self._own(tail, holders=1)
        else:
            sequence.window.append(int(self.pool.allocate(1, after=tail)[0]))

    def _own(self, page: int, holders: int) -> int:
        """Return a page with this one's content that only `holders` sequences hold; they swap it for theirs."""
        if self.pool.refcount[page] == holders:
            return page
        copy = self.pool.copy_page(page)
        self.pool.refcount[copy] = holders
        self.pool.refcount[page] -= holders
        return copy

    def store(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        experts: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> None:
        """Append the tokens of a prompt, a chunk or a draft.

        Parameters
        ----------
        keys, values : torch.Tensor
            `(B, H, Q, D)` and `(B, H, Q, Dv)`.
        positions : torch.Tensor
            `(Q,)` int32.
        experts : torch.Tensor
            `(B, Q)` int16.
        valid : torch.Tensor, optional
            `(B, Q)` bool, False for padding, which is not stored.
        """
        leaders = self._identical_rows(keys, values, valid)
        picks = {row: slice(None) if valid is None else valid[row].nonzero().squeeze(1) for row in set(leaders)}
        with self.pool.transaction():
            rows = self._part(leaders)
            shards = {row: self._shards(positions[pick], experts[row][pick]) for row, pick in picks.items()}
            self.pool.reserve(sum(self._pages_needed(rows[row], shards[row]) for row in picks))
            for row, pick in picks.items():
                tokens = keys[row][:, pick], values[row][:, pick], positions[pick], experts[row][pick]
                self._store_row(rows[row], shards[row], *tokens)
        self.rows[:] = rows
        self._changed()

    def _shards(self, positions: torch.Tensor, experts: torch.Tensor) -> np.ndarray:
        return self.shard_of(positions, experts).cpu().numpy()

    def _store_row(self, sequence: SequencePages, shards: np.ndarray, *tokens: torch.Tensor) -> None:
        """Write one row's new tokens: `(H, n, D)` keys, `(H, n, Dv)` values, `(n,)` positions and experts."""
        first, direct, flush = self._window_split(sequence, len(shards))
        if first:
            keys, values, positions, experts = tokens
            slots = self.pool.index(self._window_slots(sequence, first))
            self.pool.write(slots, keys[:, :first], values[:, :first], positions[:first], experts[:first])
            tokens = keys[:, first:], values[:, first:], positions[first:], experts[first:]
        for _ in range(flush):
            self._flush_page([sequence])
        if len(shards) > first:
            passing = self._shard_slots([sequence], shards[first : first + direct])
            staying = self._window_slots(sequence, len(shards) - first - direct)
            self.pool.write(self.pool.index(np.concatenate([passing, staying])), *tokens)

    def _identical_rows(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> list[int]:
        """Return for each row the first row with the same past and the same new tokens.

        `generate(num_beams=n)` repeats its inputs before the prompt is run, so n rows of one prompt arrive as n equal
        blocks of K/V. Comparing the last token first makes the usual answer, no, almost free.
        """
        leaders = list(range(len(self.rows)))
        for row in range(1, len(self.rows)):
            for other in dict.fromkeys(leaders[:row]):
                if (
                    self.rows[row] is self.rows[other]
                    and torch.equal(keys[row, :, -1], keys[other, :, -1])
                    and (valid is None or torch.equal(valid[row], valid[other]))
                    and torch.equal(keys[row], keys[other])
                    and torch.equal(values[row], values[other])
                ):
                    leaders[row] = other
                    break
        return leaders

    def _window_split(self, sequence: SequencePages, new: int) -> tuple[int, int, int]:
        """Divide `new` tokens into those that enter the window, pass straight to shards, and end in the window.

        The first number fills the sink pages and the partly filled window page; `flush` counts full window pages that
        leave before the second part does.
        """
        size = self.pool.page_size
        held = int(self.pool.count[sequence.window].sum()) if sequence.window else 0
        sink_room = max(0, self.sink_pages * size - held)
        first = min(new, sink_room) if sink_room else min(new, -held % size)
        after = max(0, held + new - self.sink_pages * size)
        leaving = max(0, after - self.recent_window) // size
        old = max(0, (held + first) // size - self.sink_pages)
        direct = min(max(0, leaving - old) * size, new - first)
        return first, direct, min(leaving, old)

    def _pages_needed(self, sequence: SequencePages, shards: np.ndarray) -> int:
        """Return how many pages :meth:`_store_row` may allocate before pages that leave the window are free again."""
        size = self.pool.page_size
        first, direct, flush = self._window_split(sequence, len(shards))
        window = -(-first // size) + -(-(len(shards) - first - direct) // size)
        passing = self._shard_pages(sequence, 1, shards[first : first + direct])
        return window + passing + (flush + self.num_shards if flush else 0)

    def _shard_pages(self, sequence: SequencePages, holders: int, shards: np.ndarray) -> int:
        """Return how many pages :meth:`_shard_slots` allocates, copies of shared open pages included."""
        counts = np.bincount(shards, minlength=self.num_shards)
        is_open = sequence.open >= 0
        room = np.zeros(self.num_shards, dtype=np.int64)
        room[is_open] = self.pool.page_size - self.pool.count[sequence.open[is_open]]
        shared = (counts[is_open] > 0) & (self.pool.refcount[sequence.open[is_open]] != holders)
        return int((-(-np.maximum(counts - room, 0) // self.pool.page_size)).sum() + shared.sum())

    def _window_slots(self, sequence: SequencePages, tokens: int) -> PageIds:
        size = self.pool.page_size
        slots: list[PageIds] = []
        while tokens > 0:
            if not self._has_room(sequence):
                tail = sequence.window[-1] if sequence.window else -1
                if tail < 0 or self.pool.count[tail] == size:
                    sequence.window += self.pool.allocate(-(-tokens // size), after=tail).tolist()
                    return np.concatenate([*slots, self._fill_new(sequence.window[-(-(-tokens // size)) :], tokens)])
                self._make_room(sequence)
            slots.append(
                self._fill_new([sequence.window[-1]], min(tokens, size - self.pool.count[sequence.window[-1]]))
            )
            tokens -= len(slots[-1])
        return np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64)

    def _fill_new(self, pages: list[int], tokens: int) -> PageIds:
        """Count `tokens` more tokens into `pages` (only the first may hold some already); return their slots."""
        size = self.pool.page_size
        ids = np.asarray(pages, dtype=np.int64)
        offset = int(self.pool.count[ids[0]])
        places = offset + np.arange(tokens)
        counts = np.minimum(np.maximum(offset + tokens - size * np.arange(len(ids)), 0), size)
        self.pool.count[ids] = counts
        return ids[places // size] * size + places % size

    # Moving tokens from the window to their shards

    def flush(self) -> None:
        """Move every page that has left the recent window to the shards, once for all rows that share it."""
        ripe = [row for row in {id(row): row for row in self.rows}.values() if self._is_ripe(row)]
        while ripe:
            groups: dict[tuple[int, bytes], list[SequencePages]] = defaultdict(list)
            for row in ripe:
                groups[row.window[self.sink_pages], row.open.tobytes()].append(row)
            shards = {key: self._page_shards(key[0]) for key in groups}
            self.pool.reserve(sum(self._shard_pages(rows[0], len(rows), shards[key]) for key, rows in groups.items()))
            for key, rows in groups.items():
                self._flush_page(rows, shards[key])
            self._changed()
            ripe = [row for row in ripe if self._is_ripe(row)]

    def _page_shards(self, page: int) -> np.ndarray:
        return self._shards(self.pool.positions[page], self.pool.experts[page])

    def _is_ripe(self, sequence: SequencePages) -> bool:
        recent = sequence.window[self.sink_pages :]
        size = self.pool.page_size
        if len(recent) * size < self.recent_window + size:
            return False
        held = (len(recent) - 1) * size + int(self.pool.count[recent[-1]])
        return held >= self.recent_window + size

    def _flush_page(self, group: list[SequencePages], shards: np.ndarray | None = None) -> None:
        """Move the oldest recent page, which all sequences of `group` share, to their shards, which they share too."""
        page = group[0].window[self.sink_pages]
        slots = self._shard_slots(group, self._page_shards(page) if shards is None else shards)
        start = page * self.pool.page_size
        self.pool.move(self.pool.index(np.arange(start, start + self.pool.page_size)), self.pool.index(slots))
        for sequence in group:
            del sequence.window[self.sink_pages]
        self.pool.release(np.full(len(group), page))

    def _shard_slots(self, group: list[SequencePages], shards: np.ndarray) -> PageIds:
        """Take a slot for each token in the open page of its shard, the same for all sequences of `group`."""
        pool, size, holders = self.pool, self.pool.page_size, len(group)
        slots = np.empty(len(shards), dtype=np.int64)
        open_pages, sealed = group[0].open.copy(), []
        for shard in np.unique(shards):
            tokens = np.flatnonzero(shards == shard)
            page = int(open_pages[shard])
            pages = [self._own(page, holders)] if page >= 0 else []
            room = size - int(pool.count[pages[0]]) if pages else 0
            more = -(-max(0, len(tokens) - room) // size)
            if more:
                new = pool.allocate(more, shard=int(shard))
                pool.refcount[new] = holders
                pages += new.tolist()
            slots[tokens] = self._fill_new(pages, len(tokens))
            last_full = pool.count[pages[-1]] == size
            sealed += pages if last_full else pages[:-1]
            open_pages[shard] = -1 if last_full else pages[-1]
        for sequence in group:
            sequence.open = open_pages.copy()
            if sealed:
                sequence.sealed = np.append(sequence.sealed, np.asarray(sealed, dtype=np.int64))
        return slots

    # Removing tokens

    def crop(self, length: int) -> None:
        """Forget every token at position `length` or later."""
        kept = {id(row): self._tokens_before(row, length) for row in self.rows}
        sequences = {id(row): row for row in self.rows}
        self.pool.reserve(sum(int(self._is_shared_cut(row.pages(), kept[key]).sum()) for key, row in sequences.items()))
        cropped = {key: self._cropped(row, kept[key]) for key, row in sequences.items()}
        self.rows[:] = [cropped[id(row)] for row in self.rows]
        self._changed()

    def _tokens_before(self, sequence: SequencePages, length: int) -> PageIds:
        """Return for each of the sequence's pages how many of its tokens lie before position `length`."""
        positions = self.pool.positions[self.pool.index(sequence.pages())]
        return ((positions >= 0) & (positions < length)).sum(dim=1).cpu().numpy()

    def _is_shared_cut(self, ids: PageIds, keep: PageIds) -> np.ndarray:
        return (keep > 0) & (keep < self.pool.count[ids]) & (self.pool.refcount[ids] > 1)

    def _cropped(self, sequence: SequencePages, keep: PageIds) -> SequencePages:
        ids = sequence.pages()
        kept = {int(page): int(page) for page in ids[keep > 0]}
        for page, count in zip(ids.tolist(), keep.tolist(), strict=True):
            if 0 < count < self.pool.count[page]:
                kept[page] = self._own(page, holders=1)
                self.pool.truncate(kept[page], count)
        self.pool.release(ids[keep == 0])
        # Pages of a shard follow one another in time, so at most one page per shard is left partly filled.
        open_pages = np.full(self.num_shards, -1, dtype=np.int64)
        sealed = []
        for page in [*sequence.sealed.tolist(), *sequence.open[sequence.open >= 0].tolist()]:
            if page in kept and self.pool.count[kept[page]] == self.pool.page_size:
                sealed.append(kept[page])
            elif page in kept:
                open_pages[self.pool.shard[page]] = kept[page]
        window = [kept[page] for page in sequence.window if page in kept]
        return SequencePages(window, open_pages, np.asarray(sealed, dtype=np.int64))

    # Reading

    def plan(self) -> ReadPlan:
        """Return how attention reads this table; made anew only after pages changed hands."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def dense(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all K/V by position, `(B, H, length, D)` and `(B, H, length, Dv)`; zeros where nothing is stored."""
        pool = self.pool
        keys = pool.keys.new_zeros((len(self.rows), pool.keys.shape[0], length, pool.keys.shape[-1]))
        values = pool.values.new_zeros((*keys.shape[:3], pool.values.shape[-1]))
        for row, sequence in enumerate(self.rows):
            ids = pool.index(sequence.pages())
            positions = pool.positions[ids].view(-1)
            slots = (ids[:, None] * pool.page_size + torch.arange(pool.page_size, device=ids.device)).view(-1)
            held = positions >= 0
            keys[row].index_copy_(1, positions[held].long(), pool.flat_keys.index_select(1, slots[held]))
            values[row].index_copy_(1, positions[held].long(), pool.flat_values.index_select(1, slots[held]))
        return keys, values

    def _make_plan(self) -> ReadPlan:
        rows_of: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(self.rows):
            rows_of[id(row)].append(index)
        members = list(rows_of.values())
        holds = np.zeros((len(members), self.pool.capacity + 2), dtype=np.bool_)
        for line, indices in zip(holds, members, strict=True):
            line[self.rows[indices[0]].pages() + 1] = True
        edges = np.flatnonzero((holds[:, 1:] != holds[:, :-1]).any(axis=0))
        runs: list[Run] = []
        scattered: dict[int, list[int]] = defaultdict(list)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            rows = [row for line, indices in zip(holds, members, strict=True) if line[start + 1] for row in indices]
            if not rows:
                continue
            if stop - start >= MIN_RUN:
                runs.append(Run(start, stop, sorted(rows)))
            else:
                for row in rows:
                    scattered[row] += range(start, stop)
        lengths = np.array([len(scattered[row]) for row in range(len(self.rows))], dtype=np.int64)
        table = np.zeros((len(self.rows), int(lengths.max(initial=0))), dtype=np.int64)
        for index, line in enumerate(table):
            # Filled up with a page of its own: nothing of another row is read, not even to be masked.
            line[:] = self.rows[index].pages()[:1] if len(self.rows[index].window) else 0
            line[: lengths[index]] = scattered[index]
        return ReadPlan(runs, table, lengths)
