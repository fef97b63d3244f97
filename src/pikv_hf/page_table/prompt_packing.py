"""Packing the tokens of a prompt that pass straight to their shards, without storing them as they came first."""

import numpy as np

from ..pages.page_contents import PageContents
from ..pages.plain_pool import PlainPool
from ..pages.tokens import TokenBatch
from .layer_pools import LayerPools
from .page_packing import pack_full, pack_pages
from .sequence_pages import SequencePages
from .slots import shard_slots

#: So many pages are packed at a time.
CHUNK_PAGES = 128


def pack_prompt(pools: LayerPools, sequence: SequencePages, shards: np.ndarray, tokens: TokenBatch) -> TokenBatch:
    """Move the first tokens to their `shards` `(n,)` and pack the pages that they fill; return the other tokens."""
    size = pools.plain.page_size
    for start in range(0, len(shards), step := CHUNK_PAGES * size):
        some, of_shards = tokens[start : start + step], shards[start : start + step]
        whole, before, after = _divide_by_pages(pools.plain, sequence, of_shards)
        if not pools.encoders.is_ready(len(whole) * size):
            whole, before, after = whole[:0], np.arange(len(of_shards)), after[:0]
        _store_plain(pools.plain, sequence, of_shards, some, before)
        pack_full(pools, [sequence])
        if len(whole):
            picked = some.pick(pools.plain.index(whole).view(-1))
            _pack_whole(pools, sequence, PageContents.from_tokens(picked, of_shards[whole[:, 0]]))
        _store_plain(pools.plain, sequence, of_shards, some, after)
    return tokens[len(shards) :]


def _divide_by_pages(
    pool: PlainPool, sequence: SequencePages, shards: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide tokens, as their numbers: whole pages `(n, P)`, what fills open pages before, what is left after."""
    size = pool.page_size
    whole, before, after = [np.zeros((0, size), dtype=np.int64)], [], []
    for shard in np.unique(shards):
        mine, page = np.flatnonzero(shards == shard), int(sequence.open[shard])
        filling = min(len(mine), size - int(pool.count[page])) if page >= 0 else 0
        end = filling + (len(mine) - filling) // size * size
        before.append(mine[:filling])
        whole.append(mine[filling:end].reshape(-1, size))
        after.append(mine[end:])
    return np.concatenate(whole), np.concatenate(before), np.concatenate(after)


def _store_plain(
    pool: PlainPool, sequence: SequencePages, shards: np.ndarray, tokens: TokenBatch, which: np.ndarray
) -> None:
    """Write the tokens at `which` `(m,)` to the open pages of their shards."""
    if len(which):
        slots = pool.index(shard_slots(pool, [sequence], shards[which]))
        pool.write(slots, tokens.pick(pool.index(which)))


def _pack_whole(pools: LayerPools, sequence: SequencePages, contents: PageContents) -> None:
    """Pack tokens that fill pages on their own; what no codec holds well enough is stored as it is."""
    left = np.ones(len(contents.shards), dtype=np.bool_)
    for pool_id, (which, ids) in pack_pages(pools, contents).items():
        pools.add_packed(sequence, pool_id, ids)
        left[which] = False
    if left.any():
        _store_full(pools.plain, sequence, contents.pick(np.flatnonzero(left)))


def _store_full(pool: PlainPool, sequence: SequencePages, contents: PageContents) -> None:
    """Store full pages as they are."""
    ids = np.concatenate([pool.allocate(1, shard=int(shard)) for shard in contents.shards])
    pool.count[ids], pool.incompressible[ids] = pool.page_size, True
    slots = (ids[:, None] * pool.page_size + np.arange(pool.page_size)).reshape(-1)
    pool.write(pool.index(slots), contents.tokens())
    sequence.full = np.append(sequence.full, ids)
