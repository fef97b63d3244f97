"""Packing the tokens of a prompt that pass straight to their shards, without storing them as they come first."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..pages.page_contents import PageContents
from ..pages.plain_pool import PlainPool
from ..pages.tokens import TokenBatch
from .sequence_pages import SequencePages

if TYPE_CHECKING:
    from .sequence_writer import SequenceWriter

# So many pages are packed at a time.
CHUNK_PAGES = 128


def pack_prompt(
    writer: "SequenceWriter", sequence: SequencePages, shards: np.ndarray, tokens: TokenBatch
) -> TokenBatch:
    """Move the first tokens to their shards and pack the pages that they fill; return the other tokens."""
    for start in range(0, len(shards), step := CHUNK_PAGES * writer.plain.page_size):
        chunk = shards[start : start + step]
        whole, before, after = _divide_by_pages(writer.plain, sequence, chunk)
        if not writer.pools.is_ready(len(whole)):
            whole, before, after = whole[:0], np.arange(len(chunk)), after[:0]
        _pass(writer, sequence, chunk, before, start, tokens)
        writer.pools.pack_full([sequence])
        if len(whole):
            _pack(writer, sequence, chunk[whole[:, 0]], writer.plain.index(start + whole), tokens)
        _pass(writer, sequence, chunk, after, start, tokens)
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


def _pass(
    writer: "SequenceWriter",
    sequence: SequencePages,
    shards: np.ndarray,
    which: np.ndarray,
    start: int,
    tokens: TokenBatch,
) -> None:
    """Write some tokens of a chunk that begins at `start` to the open pages of their shards."""
    if len(which):
        slots = writer.plain.index(writer.shard_slots([sequence], shards[which]))
        writer.plain.write(slots, tokens.pick(writer.plain.index(start + which)))


def _pack(
    writer: "SequenceWriter",
    sequence: SequencePages,
    shards: np.ndarray,
    index: torch.Tensor,
    tokens: TokenBatch,
) -> None:
    """Pack tokens that fill pages on their own: `index` `(n, P)` are their numbers, `shards` `(n,)` the pages'."""
    contents = PageContents.of(tokens.pick(index.view(-1)), shards)
    left = np.ones(len(shards), dtype=np.bool_)
    for name, (which, ids) in writer.pools.pack(contents).items():
        writer.pools.give(sequence, name, ids)
        left[which] = False
    if left.any():
        _keep(writer.plain, sequence, contents, np.flatnonzero(left))


def _keep(pool: PlainPool, sequence: SequencePages, contents: PageContents, which: np.ndarray) -> None:
    """Store full pages as they are."""
    ids = np.concatenate([pool.allocate(1, shard=int(shard)) for shard in contents.shards[which]])
    pool.count[ids], pool.incompressible[ids] = pool.page_size, True
    slots = (ids[:, None] * pool.page_size + np.arange(pool.page_size)).reshape(-1)
    pool.write(pool.index(slots), contents.pick(which).tokens())
    sequence.full = np.append(sequence.full, ids)
