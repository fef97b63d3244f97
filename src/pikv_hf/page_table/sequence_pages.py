"""The pages of one sequence: a window in time order, and the pages of its shards."""

import dataclasses
import enum
from collections.abc import Iterable

import numpy as np

from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds


class Region(enum.Enum):
    """Some of a sequence's pages in the plain pool, which attention may read by themselves."""

    WINDOW = "window"
    UNFILLED = "unfilled"


@dataclasses.dataclass(slots=True, eq=False)
class SequencePages:
    """The page numbers of one sequence. Rows of a table that hold the same tokens share one object.

    Attributes
    ----------
    window : list of int
        Sink pages, then the pages of the recent tokens, in time order; all full but the last.
    open : numpy.ndarray
        `(S,)` int64, the partly filled page of each shard, -1 if it has none.
    full : numpy.ndarray
        `(n,)` int64, full pages of all shards in the order in which they filled up.
    packed : dict
        By pool, the numbers `(n,)` of the pages that a codec packed. Never changed in place.
    """

    window: list[int]
    open: PageIds
    full: PageIds
    packed: dict[PoolId, PageIds] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, num_shards: int) -> "SequencePages":
        """Return a sequence without pages."""
        return cls([], np.full(num_shards, -1, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def pages(self, pool_id: PoolId = PLAIN) -> PageIds:
        """Return the numbers of all pages in a pool, by default those kept as they came."""
        if pool_id != PLAIN:
            return self.packed.get(pool_id, np.zeros(0, dtype=np.int64))
        return np.concatenate([np.asarray(self.window, dtype=np.int64), self.open[self.open >= 0], self.full])

    def unfilled(self) -> PageIds:
        """Return the pages that are always read: the window's, and those of the shards that are not full."""
        return np.concatenate([np.asarray(self.window, dtype=np.int64), self.open[self.open >= 0]])

    def full_pages(self, pool_id: PoolId = PLAIN) -> PageIds:
        """Return the pages of the shards in a pool that take no more tokens."""
        return self.full if pool_id == PLAIN else self.pages(pool_id)

    def renumber(self, pool_id: PoolId, number: PageIds) -> None:
        """Follow the pages of a pool to other numbers, `number` `(N,)` by old one."""
        if pool_id != PLAIN:
            if pool_id in self.packed:
                self.packed = {**self.packed, pool_id: number[self.packed[pool_id]]}
            return
        self.window = number[np.asarray(self.window, dtype=np.int64)].tolist()
        self.open = np.where(self.open >= 0, number[self.open], -1)
        self.full = number[self.full]

    def copy(self) -> "SequencePages":
        """Return an independent object; the caller adds the references."""
        return SequencePages(list(self.window), self.open.copy(), self.full, self.packed)


def distinct_sequences(rows: Iterable[SequencePages]) -> list[SequencePages]:
    """Return each of the sequences once, in order of their first row."""
    return list({id(row): row for row in rows}.values())
