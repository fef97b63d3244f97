"""How attention reads a page table: long runs of pages in place, the rest gathered."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..pages.types import PageIds

# Shorter runs, in bytes of K/V, are cheaper gathered together than read one matmul at a time, and reading past as many
# free bytes is cheaper than a second run. A run costs some 80 microseconds on a CPU, in which about 1 MiB is copied.
MIN_RUN_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages held by exactly the same rows: read in place, once for all of them.

    A few free pages may lie between them; they count as pages without tokens.

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
    def of_pages(cls, start: int, stop: int, rows: list[int], counts: np.ndarray, size: int) -> "Run":
        """Make a run; `counts` `(N,)` are the tokens in each page of the pool, `size` those of a full page."""
        partial = start + np.flatnonzero(counts[start:stop] < size)
        return cls(start, stop, rows, partial, (partial - start)[:, None] * size + np.arange(size))

    def pieces(self, pages: int, counts: np.ndarray, size: int) -> Iterator["Run"]:
        """Divide the run into runs of at most `pages` pages."""
        if self.stop - self.start <= pages:
            yield self
            return
        for start in range(self.start, self.stop, pages):
            yield Run.of_pages(start, min(start + pages, self.stop), self.rows, counts, size)


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPlan:
    """All pages of all rows, in the two ways they are read.

    Attributes
    ----------
    runs : list of Run
        At least `min_run` pages each.
    scattered : numpy.ndarray
        `(B, n)` int64; shorter rows are filled up with a page of their own beyond `lengths`.
    lengths : numpy.ndarray
        `(B,)` int64, scattered pages of each row.
    bridged : numpy.ndarray
        `(n,)` int64, the free pages inside of runs.
    """

    runs: list[Run]
    scattered: PageIds
    lengths: PageIds
    bridged: PageIds


def make_plan(
    pages: Sequence[PageIds],
    members: Sequence[Sequence[int]],
    free: np.ndarray,
    counts: np.ndarray,
    size: int,
    min_run: int,
) -> ReadPlan:
    """Divide the pages of sequences into runs and scattered pages.

    Parameters
    ----------
    pages : sequence of numpy.ndarray
        The page numbers of each distinct sequence.
    members : sequence of sequences of int
        The rows that hold each of them; together all rows `0..B-1`.
    free : numpy.ndarray
        `(N,)` bool, the pages of the pool that nobody holds.
    counts : numpy.ndarray
        `(N,)`, the tokens in each page of the pool.
    size : int
        Tokens per page.
    min_run : int
        The fewest pages of a run, and the most free pages that one reads past.
    """
    runs: list[Run] = []
    scattered: dict[int, list[int]] = defaultdict(list)
    bridged = [np.zeros(0, dtype=np.int64)]
    for start, stop, rows in _bridge(_stretches(pages, members, len(counts)), free, min_run):
        if stop - start >= min_run:
            runs.append(Run.of_pages(start, stop, rows, counts, size))
            bridged.append(start + np.flatnonzero(free[start:stop]))
        else:
            for row in rows:
                scattered[row] += [page for page in range(start, stop) if not free[page]]
    table, lengths = _scattered_table(pages, members, scattered)
    return ReadPlan(runs, table, lengths, np.concatenate(bridged))


def _scattered_table(
    pages: Sequence[PageIds], members: Sequence[Sequence[int]], scattered: Mapping[int, list[int]]
) -> tuple[PageIds, PageIds]:
    """Return the scattered pages by row, `(B, n)`, and how many each row has, `(B,)`."""
    batch = sum(map(len, members))
    lengths = np.array([len(scattered[row]) for row in range(batch)], dtype=np.int64)
    table = np.zeros((batch, int(lengths.max(initial=0))), dtype=np.int64)
    for ids, shared in zip(pages, members, strict=True):
        # Filled up with a page of its own: nothing of another row is read, not even to be masked.
        table[list(shared)] = ids[0] if len(ids) else 0
    for row in range(batch):
        table[row, : lengths[row]] = scattered[row]
    return table, lengths


def _stretches(
    pages: Sequence[PageIds], members: Sequence[Sequence[int]], capacity: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield `(start, stop, rows)` of the longest stretches of pages that the same rows hold."""
    # One column of zeros on either side, so that every stretch of pages has two edges.
    holds = np.zeros((len(pages), capacity + 2), dtype=np.bool_)
    for line, ids in zip(holds, pages, strict=True):
        line[ids + 1] = True
    edges = np.flatnonzero((holds[:, 1:] != holds[:, :-1]).any(axis=0)).tolist()
    for start, stop in itertools.pairwise(edges):
        holders = np.flatnonzero(holds[:, start + 1]).tolist()
        if holders:
            yield start, stop, sorted(row for holder in holders for row in members[holder])


def _bridge(
    stretches: Iterable[tuple[int, int, list[int]]], free: np.ndarray, most: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Join stretches of the same rows with nothing but free pages between them, at most `most`."""
    joined: tuple[int, int, list[int]] | None = None
    for start, stop, rows in stretches:
        if joined is not None and joined[2] == rows and start - joined[1] <= most and free[joined[1] : start].all():
            joined = joined[0], stop, rows
            continue
        if joined is not None:
            yield joined
        joined = start, stop, rows
    if joined is not None:
        yield joined
