"""The pages of a table that may be evicted, with the statistics that policies compare."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ..page_table.page_table import PageTable
from ..page_table.sequence_pages import SequencePages
from ..pages.page_pool import PagePool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from .policies.registry import PageStats

_COLUMNS = (
    *("source", "lane", "pages", "tokens", "oldest", "newest"),
    *("mass", "recent", "born", "last_use", "previous_use", "uses"),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PagesOfSequence:
    """The pages of one sequence in one pool.

    Attributes
    ----------
    sequence : SequencePages
        The sequence.
    pool_id : PoolId
        The pool.
    lane : int
        A number for the sequence and KV head, for policies that compare them.
    """

    sequence: SequencePages
    pool_id: PoolId
    lane: int


@dataclasses.dataclass(frozen=True, slots=True)
class EvictionCandidates:
    """Pages that may go.

    Attributes
    ----------
    sources : sequence of PagesOfSequence
        Whose they are.
    of_source : numpy.ndarray
        `(n,)`, index of the source of each page.
    pages : numpy.ndarray
        `(n,)` page numbers.
    oldest : numpy.ndarray
        `(n,)`, least position in the page.
    stats : PageStats
        What policies see of them.
    """

    sources: Sequence[PagesOfSequence]
    of_source: np.ndarray
    pages: PageIds
    oldest: np.ndarray
    stats: PageStats

    @classmethod
    def of(
        cls, table: PageTable, sources: Sequence[PagesOfSequence], now: int, is_open: bool, shard: int | None = None
    ) -> "EvictionCandidates":
        """Collect the full pages of sources, or the open pages of their shards, in one shard or in all."""
        pools = table.pools.by_id()
        columns = [np.zeros((len(_COLUMNS), 0))]
        for number, source in enumerate(sources):
            pool = pools[source.pool_id]
            ids = _pages(source, is_open)
            if shard is not None:
                ids = ids[pool.shard[ids] == shard]
            if len(ids):
                where = np.full(len(ids), number), np.full(len(ids), source.lane)
                columns.append(np.stack([*where, ids, *_known(pool, ids)]))
        known = dict(zip(_COLUMNS, np.concatenate(columns, axis=1), strict=True))
        source, pages, oldest = (known.pop(name).astype(np.int64) for name in ("source", "pages", "oldest"))
        return cls(sources, source, pages, oldest, _stats(known, now))

    def pick(self, which: np.ndarray) -> "EvictionCandidates":
        """Return some of the pages."""
        fields = {f.name: getattr(self.stats, f.name) for f in dataclasses.fields(PageStats)}
        picked = {name: value[which] if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        return EvictionCandidates(
            self.sources, self.of_source[which], self.pages[which], self.oldest[which], PageStats(**picked)
        )

    def with_bounds(self, bounds: np.ndarray) -> "EvictionCandidates":
        """Return the same pages with upper bounds of recent queries' logits, `(n,)`."""
        return dataclasses.replace(self, stats=dataclasses.replace(self.stats, bounds=bounds))

    def by_source(self) -> Iterator[tuple[PagesOfSequence, np.ndarray]]:
        """Yield each source with the pages that are in it, as indices."""
        for number in np.unique(self.of_source):
            yield self.sources[number], np.flatnonzero(self.of_source == number)


def _pages(source: PagesOfSequence, is_open: bool) -> PageIds:
    if not is_open:
        return source.sequence.full_pages(source.pool_id)
    return source.sequence.open[source.sequence.open >= 0] if source.pool_id == PLAIN else np.zeros(0, dtype=np.int64)


def stats_of(pool: PagePool, ids: PageIds, now: int) -> PageStats:
    """Return what policies see of pages `(n,)` of one pool, whichever sequences they belong to."""
    known = dict(zip(_COLUMNS[3:], _known(pool, ids), strict=True))
    del known["oldest"]
    return _stats({**known, "lane": np.zeros(len(ids))}, now)


def _stats(known: dict[str, np.ndarray], now: int) -> PageStats:
    reals = ("mass", "recent")
    return PageStats(
        step=now, **{name: part.astype(float if name in reals else np.int64) for name, part in known.items()}
    )


def _known(pool: PagePool, ids: PageIds) -> list[np.ndarray]:
    """Return what `_COLUMNS` names from "tokens" on, `(n,)` each."""
    index = pool.index(ids)
    positions = pool.positions[index]
    oldest = positions.masked_fill(positions < 0, 2**31 - 1).amin(dim=1)
    assert pool.usage is not None
    shares, steps = pool.usage.shares[:, index].cpu().numpy(), pool.usage.steps[:, index].cpu().numpy()
    return [pool.count[ids], oldest.cpu().numpy(), positions.amax(dim=1).cpu().numpy(), *shares, *steps]
