"""Slots of the plain pool that tokens are written to: in the window, or in the open pages of their shards."""

import numpy as np

from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds
from .sequence_pages import SequencePages


def pages_for(tokens: int, page_size: int) -> int:
    """Return how many pages hold so many tokens."""
    return (tokens + page_size - 1) // page_size


# In the window


def has_room(pool: PlainPool, sequence: SequencePages) -> bool:
    """Return whether the sequence alone holds a window page with a free slot."""
    if not sequence.window:
        return False
    tail = sequence.window[-1]
    return bool(pool.count[tail] < pool.page_size and pool.allocator.refcount[tail] == 1)


def make_room(pool: PlainPool, sequence: SequencePages) -> None:
    """Give a sequence a window page with a free slot that it alone holds. Allocates one page at most."""
    tail = sequence.window[-1] if sequence.window else -1
    if tail >= 0 and pool.count[tail] < pool.page_size:
        sequence.window[-1] = pool.copy_on_write(tail, holders=1)
    else:
        sequence.window.append(int(pool.allocate(1, after=tail)[0]))


def window_slots(pool: PlainPool, sequence: SequencePages, tokens: int) -> PageIds:
    """Take the next window slots: the rest of the last page, then new pages."""
    slots = [np.zeros(0, dtype=np.int64)]
    if tokens and sequence.window and pool.count[sequence.window[-1]] < pool.page_size:
        make_room(pool, sequence)
        tail = sequence.window[-1]
        slots.append(_fill(pool, [tail], min(tokens, pool.page_size - int(pool.count[tail]))))
        tokens -= len(slots[-1])
    if tokens:
        after = sequence.window[-1] if sequence.window else -1
        new = pool.allocate(pages_for(tokens, pool.page_size), after=after).tolist()
        sequence.window += new
        slots.append(_fill(pool, new, tokens))
    return np.concatenate(slots)


# In the shards


def shard_pages_needed(pool: PlainPool, sequence: SequencePages, holders: int, shards: np.ndarray) -> int:
    """Return how many pages tokens of these shards take, copies of open pages that others hold included."""
    counts = np.bincount(shards[shards >= 0], minlength=len(sequence.open))
    is_open = sequence.open >= 0
    room = np.zeros(len(sequence.open), dtype=np.int64)
    room[is_open] = pool.page_size - pool.count[sequence.open[is_open]]
    copies = (counts[is_open] > 0) & (pool.allocator.refcount[sequence.open[is_open]] != holders)
    new = np.maximum(counts - room + pool.page_size - 1, 0) // pool.page_size
    return int(new.sum() + copies.sum())


def shard_slots(pool: PlainPool, group: list[SequencePages], shards: np.ndarray) -> PageIds:
    """Take a slot for each token in the open page of its shard, the same for all sequences of `group`."""
    slots = np.empty(len(shards), dtype=np.int64)
    open_pages, filled = group[0].open.copy(), []
    for shard in np.unique(shards):
        tokens = np.flatnonzero(shards == shard)
        pages = _shard_room(pool, int(open_pages[shard]), int(shard), len(tokens), len(group))
        slots[tokens] = _fill(pool, pages, len(tokens))
        is_full = pool.count[pages[-1]] == pool.page_size
        filled += pages if is_full else pages[:-1]
        open_pages[shard] = -1 if is_full else pages[-1]
    for sequence in group:
        sequence.open = open_pages.copy()
        if filled:
            sequence.full = np.append(sequence.full, np.asarray(filled, dtype=np.int64))
    return slots


def _shard_room(pool: PlainPool, open_page: int, shard: int, tokens: int, holders: int) -> list[int]:
    """Return pages of a shard that `holders` sequences alone hold, with room for more tokens: its open page first."""
    pages = [pool.copy_on_write(open_page, holders)] if open_page >= 0 else []
    room = pool.page_size - int(pool.count[pages[0]]) if pages else 0
    if tokens > room:
        new = pool.allocate(pages_for(tokens - room, pool.page_size), shard=shard, holders=holders)
        pages += new.tolist()
    return pages


def _fill(pool: PlainPool, pages: list[int], tokens: int) -> PageIds:
    """Count `tokens` more tokens into `pages`, of which only the first may hold some; return their slots."""
    size = pool.page_size
    ids = np.asarray(pages, dtype=np.int64)
    offset = int(pool.count[ids[0]])
    slots = offset + np.arange(tokens)
    pool.count[ids] = np.clip(offset + tokens - size * np.arange(len(ids)), 0, size)
    return ids[slots // size] * size + slots % size
