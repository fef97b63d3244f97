"""Adding tokens to sequences, and moving them from the window to the shards of their experts."""

from collections.abc import Callable

import numpy as np
import torch

from ..pages.tokens import TokenBatch
from ..sharding.shard_map import ShardMap
from .layer_pools import LayerPools
from .page_packing import pack_full
from .prompt_packing import pack_prompt
from .sequence_pages import SequencePages
from .slots import pages_for, shard_pages_needed, shard_slots, window_slots

# Maps (positions, experts) of tokens, int32 and int16 `(n,)`, to their shards.
ShardOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SequenceWriter:
    """Adds tokens to sequences and moves them from window to shards.

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
        self.sink_pages = pages_for(sink_tokens, self.plain.page_size)
        self._shard_of = shard_of
        self._shard_map: ShardMap | None = None
        self._part = 0
        self._counts = False

    @property
    def reads_window(self) -> bool:
        """Whether attention reads the window of this part; all parts have one, and only that of part 0 is read."""
        return self._part == 0

    def write_part(self, shard_map: ShardMap | None, part: int, counts: bool = True) -> None:
        """Write only the shards that `shard_map` gives this part; `counts`: tell it what leaves the window."""
        self._shard_map, self._part, self._counts = shard_map, part, counts

    def set_shard_of(self, shard_of: ShardOf) -> None:
        """Give later tokens to other shards than before."""
        self._shard_of = shard_of

    def shards(self, positions: torch.Tensor, experts: torch.Tensor) -> np.ndarray:
        """Return the shards of tokens, `(n,)`, on the host; below 0 for those of other parts."""
        shards = self._shard_of(positions, experts).cpu().numpy()
        if self._shard_map is None:
            return shards
        return self._shard_map.own(shards, positions.cpu().numpy(), self._part)

    def count_leaving(self, shards: np.ndarray) -> None:
        """Tell the shard map the shards `(n,)` of tokens that leave the window."""
        if self._shard_map is not None and self._counts:
            self._shard_map.note(shards, self._part)

    def page_shards(self, page: int) -> np.ndarray:
        """Return the shards of a page's tokens, `(count,)`."""
        count = int(self.plain.count[page])
        return self.shards(self.plain.positions[page, :count], self.plain.experts[page, :count])

    # Into the window

    def pages_needed(self, sequence: SequencePages, shards: np.ndarray) -> int:
        """Return how many pages :meth:`append` allocates at most for tokens of these shards."""
        size = self.plain.page_size
        first, direct, leaving = self._divide(sequence, len(shards))
        window = pages_for(first, size) + pages_for(len(shards) - first - direct, size)
        leaving_shards = self._leaving_shards(sequence, leaving, shards[:first])
        passing = np.append(leaving_shards, shards[first : first + direct])
        needed = shard_pages_needed(self.plain, sequence, 1, passing)
        if not self.pools.encoders.packs:
            return window + needed
        # An estimate, that the pool may grow once instead of twice: most pages are packed without passing through it.
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
        known = [self.page_shards(page) for page in sequence.window[self.sink_pages :][:pages]]
        return np.concatenate([*known, new])[: pages * self.plain.page_size]

    def _divide(self, sequence: SequencePages, new: int) -> tuple[int, int, int]:
        """Divide new tokens: how many fill up the page (or sink pages) begun, how many pass straight to the shards.

        The third number is the window pages that leave in between.
        """
        size = self.plain.page_size
        stored = int(self.plain.count[sequence.window].sum()) if sequence.window else 0
        sink_room = max(0, self.sink_pages * size - stored)
        first = min(new, sink_room or -stored % size)
        recent = max(0, stored + new - self.sink_pages * size)
        leaving = max(0, recent - self.recent_window) // size
        full = max(0, (stored + first) // size - self.sink_pages)
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
            slots = self.plain.index(window_slots(self.plain, sequence, first))
            self.plain.write(slots, tokens[:first].to(self.plain.device))
            tokens = tokens[first:]
        for _ in range(leaving):
            leaving_shards = self.page_shards(sequence.window[self.sink_pages])
            self.count_leaving(leaving_shards)
            self.flush_page([sequence], leaving_shards)
        passing, staying = shards[first : first + direct], len(shards) - first - direct
        if self._shard_map is not None:
            self.count_leaving(passing)
            tokens = self._without_others(tokens, passing)
            passing = passing[passing >= 0]
        if self.pools.encoders.packs and direct:
            pack_full(self.pools, [sequence])
            tokens = pack_prompt(self.pools, sequence, passing, tokens)
            passing = passing[:0]
        if len(passing) or staying:
            taken = shard_slots(self.plain, [sequence], passing), window_slots(self.plain, sequence, staying)
            self.plain.write(self.plain.index(np.concatenate(taken)), tokens)

    def _without_others(self, tokens: TokenBatch, passing: np.ndarray) -> TokenBatch:
        """Return this part's tokens and those of the window, on its device: no others travel."""
        stays = np.concatenate([passing >= 0, np.ones(len(tokens) - len(passing), dtype=np.bool_)])
        index = torch.from_numpy(np.flatnonzero(stays)).to(tokens.positions.device)
        return tokens.pick(index).to(self.plain.device)

    # From the window to the shards

    def is_ripe(self, sequence: SequencePages) -> bool:
        """Return whether a page has left the recent window."""
        return self.until_ripe(sequence) <= 0

    def until_ripe(self, sequence: SequencePages) -> int:
        """Return how many more tokens it takes until a page has left the recent window."""
        size, recent = self.plain.page_size, len(sequence.window) - self.sink_pages
        tokens = 0 if recent <= 0 else (recent - 1) * size + int(self.plain.count[sequence.window[-1]])
        return self.recent_window + size - tokens

    def flush_page(self, group: list[SequencePages], shards: np.ndarray) -> None:
        """Move the oldest recent page, which all sequences of `group` share, to their shards, which they share too."""
        page = group[0].window[self.sink_pages]
        mine = np.flatnonzero(shards >= 0)
        if len(mine):
            slots = shard_slots(self.plain, group, shards[mine])
            self.plain.move(self.plain.index(page * self.plain.page_size + mine), self.plain.index(slots))
        for sequence in group:
            del sequence.window[self.sink_pages]
        self.plain.decref(np.full(len(group), page))
