"""Adding tokens to sequences, moving them from window to shards, removing them."""

from collections.abc import Callable

import numpy as np
import torch

from ..pages.pool_id import PLAIN, PoolId
from ..pages.tokens import TokenBatch
from ..pages.types import PageIds
from ..sharding.shard_map import ShardMap
from .layer_pools import LayerPools
from .prompt_packing import pack_prompt
from .sequence_pages import SequencePages

# Maps (positions, experts) of tokens, int32 and int16 `(n,)`, to their shards.
ShardOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SequenceWriter:
    """Adds tokens to sequences, moves them from window to shards, and removes them.

    Tokens enter the window. Whole pages leave it, oldest first, once `recent_window` newer tokens are there, and their
    tokens move to the open pages of their shards. A page that other sequences hold too is copied before it is written.

    Parameters
    ----------
    pools : LayerPools
        Where pages come from.
    num_shards, recent_window, sink_tokens : int
        As in :class:`~pikv_hf.PiKVConfig`.
    shard_of : callable
        Maps `(positions, experts)` of tokens to shards.
    """

    def __init__(
        self, pools: LayerPools, num_shards: int, recent_window: int, sink_tokens: int, shard_of: ShardOf
    ) -> None:
        self.pools = pools
        self.plain = pools.plain
        self.num_shards = num_shards
        self.recent_window = recent_window
        self.sink_pages = _pages_for(sink_tokens, self.plain.page_size)
        self._shard_of = shard_of
        self._shard_map: ShardMap | None = None
        self._part = 0
        self._counts = False

    @property
    def reads_window(self) -> bool:
        """Whether attention takes the window from here."""
        return self._part == 0

    def share(self, shard_map: ShardMap | None, part: int, counts: bool = True) -> None:
        """Leave to other parts what `shard_map` gives them; `counts`: tell it what leaves the window."""
        self._shard_map, self._part, self._counts = shard_map, part, counts

    def follow(self, shard_of: ShardOf) -> None:
        """Give later tokens to other shards than before."""
        self._shard_of = shard_of

    def shards(self, positions: torch.Tensor, experts: torch.Tensor) -> np.ndarray:
        """Return the shards of tokens, `(n,)`, on the host; below 0 for those of other parts."""
        shards = self._shard_of(positions, experts).cpu().numpy()
        if self._shard_map is None:
            return shards
        return self._shard_map.own(shards, positions.cpu().numpy(), self._part)

    def note(self, shards: np.ndarray) -> None:
        """Count tokens that leave the window."""
        if self._shard_map is not None and self._counts:
            self._shard_map.note(shards, self._part)

    def page_shards(self, page: int) -> np.ndarray:
        """Return the shards of a page's tokens, `(count,)`."""
        count = int(self.plain.count[page])
        return self.shards(self.plain.positions[page, :count], self.plain.experts[page, :count])

    # Into the window

    def has_room(self, sequence: SequencePages) -> bool:
        """Return whether the sequence alone holds a window page with a free slot."""
        if not sequence.window:
            return False
        tail = sequence.window[-1]
        return bool(self.plain.count[tail] < self.plain.page_size and self.plain.allocator.refcount[tail] == 1)

    def make_room(self, sequence: SequencePages) -> None:
        """Give a sequence a window page with a free slot that it alone holds. Allocates one page at most."""
        tail = sequence.window[-1] if sequence.window else -1
        if tail >= 0 and self.plain.count[tail] < self.plain.page_size:
            sequence.window[-1] = self.plain.copy_on_write(tail, holders=1)
        else:
            sequence.window.append(int(self.plain.allocate(1, after=tail)[0]))

    def pages_needed(self, sequence: SequencePages, shards: np.ndarray) -> int:
        """Return how many pages :meth:`append` allocates at most for tokens of these shards."""
        size = self.plain.page_size
        first, direct, leaving = self._divide(sequence, len(shards))
        window = _pages_for(first, size) + _pages_for(len(shards) - first - direct, size)
        leaving_shards = self._leaving_shards(sequence, leaving, shards[:first])
        passing = np.append(leaving_shards, shards[first : first + direct])
        needed = self.shard_pages_needed(sequence, 1, passing)
        if not self.pools.packs:
            return window + needed
        # Most pages are packed without passing through this pool; nothing hangs on this number being right.
        return window + min(needed, len(np.unique(passing[passing >= 0])))

    def pages_filled(self, sequence: SequencePages, shards: np.ndarray) -> int:
        """Return how many pages :meth:`append` fills with tokens of these shards."""
        first, direct, leaving = self._divide(sequence, len(shards))
        passing = np.append(self._leaving_shards(sequence, leaving, shards[:first]), shards[first : first + direct])
        counts = np.bincount(passing[passing >= 0], minlength=self.num_shards)
        is_open = sequence.open >= 0
        counts[is_open] += self.plain.count[sequence.open[is_open]]
        return int((counts // self.plain.page_size).sum())

    def _leaving_shards(self, sequence: SequencePages, pages: int, new: np.ndarray) -> np.ndarray:
        """Return the shards of the tokens in the oldest recent pages, the last of which new tokens may have to fill."""
        held = [self.page_shards(page) for page in sequence.window[self.sink_pages :][:pages]]
        return np.concatenate([*held, new])[: pages * self.plain.page_size]

    def _divide(self, sequence: SequencePages, new: int) -> tuple[int, int, int]:
        """Divide new tokens: how many fill up the page (or sink pages) begun, how many pass straight to the shards.

        The third number is the window pages that leave in between.
        """
        size = self.plain.page_size
        held = int(self.plain.count[sequence.window].sum()) if sequence.window else 0
        sink_room = max(0, self.sink_pages * size - held)
        first = min(new, sink_room or -held % size)
        recent = max(0, held + new - self.sink_pages * size)
        leaving = max(0, recent - self.recent_window) // size
        full = max(0, (held + first) // size - self.sink_pages)
        return first, min(max(0, leaving - full) * size, new - first), min(leaving, full)

    def append(self, sequence: SequencePages, shards: np.ndarray, tokens: TokenBatch) -> None:
        """Append tokens of known shards.

        Parameters
        ----------
        sequence : SequencePages
            Changed in place.
        shards : numpy.ndarray
            `(n,)`.
        tokens : TokenBatch
            n tokens of one sequence.
        """
        first, direct, leaving = self._divide(sequence, len(shards))
        if first:
            slots = self.plain.index(self._window_slots(sequence, first))
            self.plain.write(slots, tokens[:first].to(self.plain.device))
            tokens = tokens[first:]
        for _ in range(leaving):
            leaving_shards = self.page_shards(sequence.window[self.sink_pages])
            self.note(leaving_shards)
            self.flush_page([sequence], leaving_shards)
        passing, staying = shards[first : first + direct], len(shards) - first - direct
        if self._shard_map is not None:
            self.note(passing)
            tokens = self._without_others(tokens, passing)
            passing = passing[passing >= 0]
        if self.pools.packs and direct:
            self.pools.pack_full([sequence])
            tokens = pack_prompt(self, sequence, passing, tokens)
            passing = passing[:0]
        if len(passing) or staying:
            places = self.shard_slots([sequence], passing), self._window_slots(sequence, staying)
            self.plain.write(self.plain.index(np.concatenate(places)), tokens)

    def _without_others(self, tokens: TokenBatch, passing: np.ndarray) -> TokenBatch:
        """Return this part's tokens and those of the window, on its device: no others travel."""
        stays = np.concatenate([passing >= 0, np.ones(len(tokens) - len(passing), dtype=np.bool_)])
        index = torch.from_numpy(np.flatnonzero(stays)).to(tokens.positions.device)
        return tokens.pick(index).to(self.plain.device)

    def _window_slots(self, sequence: SequencePages, tokens: int) -> PageIds:
        """Take the next window slots: the rest of the last page, then new pages."""
        slots = [np.zeros(0, dtype=np.int64)]
        if tokens and sequence.window and self.plain.count[sequence.window[-1]] < self.plain.page_size:
            self.make_room(sequence)
            tail = sequence.window[-1]
            slots.append(self._fill([tail], min(tokens, self.plain.page_size - int(self.plain.count[tail]))))
            tokens -= len(slots[-1])
        if tokens:
            after = sequence.window[-1] if sequence.window else -1
            new = self.plain.allocate(_pages_for(tokens, self.plain.page_size), after=after).tolist()
            sequence.window += new
            slots.append(self._fill(new, tokens))
        return np.concatenate(slots)

    def _fill(self, pages: list[int], tokens: int) -> PageIds:
        """Count `tokens` more tokens into `pages`, of which only the first may hold some; return their slots."""
        size = self.plain.page_size
        ids = np.asarray(pages, dtype=np.int64)
        offset = int(self.plain.count[ids[0]])
        places = offset + np.arange(tokens)
        self.plain.count[ids] = np.clip(offset + tokens - size * np.arange(len(ids)), 0, size)
        return ids[places // size] * size + places % size

    # From the window to the shards

    def is_ripe(self, sequence: SequencePages) -> bool:
        """Return whether a page has left the recent window."""
        recent = sequence.window[self.sink_pages :]
        size = self.plain.page_size
        if len(recent) * size < self.recent_window + size:
            return False
        return (len(recent) - 1) * size + int(self.plain.count[recent[-1]]) >= self.recent_window + size

    def flush_page(self, group: list[SequencePages], shards: np.ndarray) -> None:
        """Move the oldest recent page, which all sequences of `group` share, to their shards, which they share too."""
        page = group[0].window[self.sink_pages]
        mine = np.flatnonzero(shards >= 0)
        if len(mine):
            slots = self.shard_slots(group, shards[mine])
            self.plain.move(self.plain.index(page * self.plain.page_size + mine), self.plain.index(slots))
        for sequence in group:
            del sequence.window[self.sink_pages]
        self.plain.decref(np.full(len(group), page))

    def shard_pages_needed(self, sequence: SequencePages, holders: int, shards: np.ndarray) -> int:
        """Return how many pages tokens of these shards take, copies of open pages that others hold included."""
        counts = np.bincount(shards[shards >= 0], minlength=self.num_shards)
        is_open = sequence.open >= 0
        room = np.zeros(self.num_shards, dtype=np.int64)
        room[is_open] = self.plain.page_size - self.plain.count[sequence.open[is_open]]
        copies = (counts[is_open] > 0) & (self.plain.allocator.refcount[sequence.open[is_open]] != holders)
        new = np.maximum(counts - room + self.plain.page_size - 1, 0) // self.plain.page_size
        return int(new.sum() + copies.sum())

    def shard_slots(self, group: list[SequencePages], shards: np.ndarray) -> PageIds:
        """Take a slot for each token in the open page of its shard, the same for all sequences of `group`."""
        slots = np.empty(len(shards), dtype=np.int64)
        open_pages, filled = group[0].open.copy(), []
        for shard in np.unique(shards):
            tokens = np.flatnonzero(shards == shard)
            pages = self._shard_room(int(open_pages[shard]), int(shard), len(tokens), len(group))
            slots[tokens] = self._fill(pages, len(tokens))
            is_full = self.plain.count[pages[-1]] == self.plain.page_size
            filled += pages if is_full else pages[:-1]
            open_pages[shard] = -1 if is_full else pages[-1]
        for sequence in group:
            sequence.open = open_pages.copy()
            if filled:
                sequence.full = np.append(sequence.full, np.asarray(filled, dtype=np.int64))
        return slots

    def _shard_room(self, open_page: int, shard: int, tokens: int, holders: int) -> list[int]:
        """Return pages that `holders` sequences alone hold, with room for more tokens of a shard."""
        pages = [self.plain.copy_on_write(open_page, holders)] if open_page >= 0 else []
        room = self.plain.page_size - int(self.plain.count[pages[0]]) if pages else 0
        if tokens > room:
            new = self.plain.allocate(_pages_for(tokens - room, self.plain.page_size), shard=shard, holders=holders)
            pages += new.tolist()
        return pages

    # Removing tokens

    def tokens_before(self, sequence: SequencePages, length: int, pool: PoolId = PLAIN) -> PageIds:
        """Return for each of the sequence's pages in a pool how many of its tokens lie before position `length`."""
        book = self.pools.by_id()[pool]
        positions = book.positions[book.index(sequence.pages(pool))]
        return ((positions >= 0) & (positions < length)).sum(dim=1).cpu().numpy()

    def copies_needed(self, sequence: SequencePages, length: int, pool: PoolId) -> int:
        """Return how many pages of a pool :meth:`cropped` copies at most."""
        ids, keep = sequence.pages(pool), self.tokens_before(sequence, length, pool)
        book = self.pools.by_id()[pool]
        return int(((keep > 0) & (keep < book.count[ids]) & (book.allocator.refcount[ids] > 1)).sum())

    def cropped(self, sequence: SequencePages, length: int) -> SequencePages:
        """Return the sequence with only its tokens before position `length`; it takes over the references.

        Counts are up to date; :meth:`wipe_cut` then clears what pages have beyond them, which could not be undone.
        """
        packed = {name: np.array(list(self._cut(sequence, length, name).values())) for name in sequence.packed}
        kept = self._cut(sequence, length, PLAIN)
        # Pages of a shard follow one another in time, so at most one page per shard is left partly filled.
        open_pages = np.full(self.num_shards, -1, dtype=np.int64)
        filled = []
        for page in [*sequence.full.tolist(), *sequence.open[sequence.open >= 0].tolist()]:
            if page in kept and self.plain.count[kept[page]] == self.plain.page_size:
                filled.append(kept[page])
            elif page in kept and open_pages[self.plain.shard[page]] < 0:
                open_pages[self.plain.shard[page]] = kept[page]
            elif page in kept:
                # Of two parts one has given its pages of a shard to the other: it stays as it is, and is not packed.
                self.plain.incompressible[kept[page]] = True
                filled.append(kept[page])
        window = [kept[page] for page in sequence.window if page in kept]
        packed = {name: ids.astype(np.int64) for name, ids in packed.items() if len(ids)}
        return SequencePages(window, open_pages, np.asarray(filled, dtype=np.int64), packed)

    def wipe_cut(self, sequence: SequencePages, length: int) -> None:
        """Forget the tokens of a sequence that :meth:`cropped` no longer counts."""
        for name, book in self.pools.by_id().items():
            ids = sequence.pages(name)
            last = book.positions[book.index(ids)].amax(dim=1).cpu().numpy() if len(ids) else ids
            for page in ids[last >= length].tolist():
                book.truncate(page, int(book.count[page]))

    def _cut(self, sequence: SequencePages, length: int, pool: PoolId) -> dict[int, int]:
        """Release the pages of a pool that lie beyond `length`, shorten others; return old and new page numbers."""
        book, ids, keep = self.pools.by_id()[pool], sequence.pages(pool), self.tokens_before(sequence, length, pool)
        kept = {int(page): int(page) for page in ids[keep > 0]}
        for page, count in zip(ids.tolist(), keep.tolist(), strict=True):
            if 0 < count < book.count[page]:
                kept[page] = book.copy_on_write(page, holders=1)
                book.count[kept[page]] = count
        book.decref(ids[keep == 0])
        return kept


def _pages_for(tokens: int, page_size: int) -> int:
    return (tokens + page_size - 1) // page_size
