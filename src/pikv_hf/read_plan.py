"""How attention reads a page table: long runs of pages in place, the rest gathered."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from .pages import PageIds

# Shorter runs are cheaper gathered together than read one matmul at a time.
MIN_RUN = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages held by exactly the same rows: read in place, once for all of them.

    Attributes
    ----------
    start, stop : int
        Pages `start..stop-1`.
    rows : list of int
        The rows that hold them.
    partial : numpy.ndarray
        `(n,)` int64, the pages that were not full when the plan was made.
    slots : numpy.ndarray
        `(n, P)` int64, their slots, counted from the first of the run.
    """

    start: int
    stop: int
    rows: list[int]
    partial: PageIds
    slots: PageIds

    @classmethod
    def of(cls, start: int, stop: int, rows: list[int], counts: np.ndarray, size: int) -> "Run":
        """Make a run; `counts` `(N,)` are the tokens in each page of the pool, `size` those of a full page."""
        partial = start + np.flatnonzero(counts[start:stop] < size)
        return cls(start, stop, rows, partial, (partial - start)[:, None] * size + np.arange(size))

    def pieces(self, pages: int, counts: np.ndarray, size: int) -> Iterator["Run"]:
        """Divide the run into runs of at most `pages` pages."""
        if self.stop - self.start <= pages:
            yield self
            return
        for start in range(self.start, self.stop, pages):
            yield Run.of(start, min(start + pages, self.stop), self.rows, counts, size)


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPlan:
    """All pages of all rows, in the two ways they are read.

    Attributes
    ----------
    runs : list of Run
        At least `MIN_RUN` pages each.
    scattered : numpy.ndarray
        `(B, n)` int64; shorter rows are filled up with a page of their own beyond `lengths`.
    lengths : numpy.ndarray
        `(B,)` int64, scattered pages of each row.
    """

    runs: list[Run]
    scattered: PageIds
    lengths: PageIds


def make_plan(pages: Sequence[PageIds], members: Sequence[Sequence[int]], counts: np.ndarray, size: int) -> ReadPlan:
    """Divide the pages of sequences into runs and scattered pages.

    Parameters
    ----------
    pages : sequence of numpy.ndarray
        The page numbers of each distinct sequence.
    members : sequence of sequences of int
        The rows that hold each of them; together all rows `0..B-1`.
    counts : numpy.ndarray
        `(N,)`, the tokens in each page of the pool.
    size : int
        Tokens per page.
    """
    # One column of zeros on either side, so that every stretch of pages has two edges.
    holds = np.zeros((len(pages), len(counts) + 2), dtype=np.bool_)
    for line, ids in zip(holds, pages, strict=True):
        line[ids + 1] = True
    edges = np.flatnonzero((holds[:, 1:] != holds[:, :-1]).any(axis=0)).tolist()
    runs: list[Run] = []
    scattered: dict[int, list[int]] = defaultdict(list)
    for start, stop in itertools.pairwise(edges):
        holders = np.flatnonzero(holds[:, start + 1]).tolist()
        rows = sorted(row for holder in holders for row in members[holder])
        if rows and stop - start >= MIN_RUN:
            runs.append(Run.of(start, stop, rows, counts, size))
        else:
            for row in rows:
                scattered[row] += range(start, stop)
    batch = sum(map(len, members))
    lengths = np.array([len(scattered[row]) for row in range(batch)], dtype=np.int64)
    table = np.zeros((batch, int(lengths.max(initial=0))), dtype=np.int64)
    for ids, shared in zip(pages, members, strict=True):
        # Filled up with a page of its own: nothing of another row is read, not even to be masked.
        table[list(shared)] = ids[0] if len(ids) else 0
    for row in range(batch):
        table[row, : lengths[row]] = scattered[row]
    return ReadPlan(runs, table, lengths)
