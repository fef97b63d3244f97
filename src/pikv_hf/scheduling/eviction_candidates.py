"""What is known of the pages that may be evicted, and evicting them."""

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
    *("place", "lane", "pages", "tokens", "oldest", "newest"),
    *("mass", "recent", "born", "last_use", "previous_use", "uses"),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PagesOfSequence:
    """The pages of one sequence in one pool.

    Attributes
    ----------
    sequence : SequencePages
        The sequence.
    pool : PoolId
        The pool.
    lane : int
        A number for the sequence and KV head, for policies that compare them.
    """

    sequence: SequencePages
    pool: PoolId
    lane: int


@dataclasses.dataclass(frozen=True, slots=True)
class EvictionCandidates:
    """Pages that may go.

    Attributes
    ----------
    places : sequence of PagesOfSequence
        Where they are.
    of_place : numpy.ndarray
        `(n,)`, which of the places each page is in.
    pages : numpy.ndarray
        `(n,)` page numbers.
    oldest : numpy.ndarray
        `(n,)`, least position in the page.
    view : PageStats
        What policies see of them.
    """

    places: Sequence[PagesOfSequence]
    of_place: np.ndarray
    pages: PageIds
    oldest: np.ndarray
    view: PageStats

    @classmethod
    def of(
        cls, table: PageTable, places: Sequence[PagesOfSequence], now: int, is_open: bool, shard: int | None = None
    ) -> "EvictionCandidates":
        """Collect the full pages of places, or the open pages of their shards, in one shard or in all."""
        pools = table.pools.by_id()
        columns = [np.zeros((len(_COLUMNS), 0))]
        for number, place in enumerate(places):
            pool = pools[place.pool]
            ids = _pages(place, is_open)
            if shard is not None:
                ids = ids[pool.shard[ids] == shard]
            if len(ids):
                where = np.full(len(ids), number), np.full(len(ids), place.lane)
                columns.append(np.stack([*where, ids, *_known(pool, ids)]))
        known = dict(zip(_COLUMNS, np.concatenate(columns, axis=1), strict=True))
        place, pages, oldest = (known.pop(name).astype(np.int64) for name in ("place", "pages", "oldest"))
        return cls(places, place, pages, oldest, _view(known, now))

    def pick(self, which: np.ndarray) -> "EvictionCandidates":
        """Return some of the pages."""
        fields = {f.name: getattr(self.view, f.name) for f in dataclasses.fields(PageStats)}
        picked = {name: value[which] if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        return EvictionCandidates(
            self.places, self.of_place[which], self.pages[which], self.oldest[which], PageStats(**picked)
        )

    def with_bounds(self, bounds: np.ndarray) -> "EvictionCandidates":
        """Return the same pages with upper bounds of recent queries' logits, `(n,)`."""
        return dataclasses.replace(self, view=dataclasses.replace(self.view, bounds=bounds))

    def by_place(self) -> Iterator[tuple[PagesOfSequence, np.ndarray]]:
        """Yield each place with the pages that are in it, as indices."""
        for number in np.unique(self.of_place):
            yield self.places[number], np.flatnonzero(self.of_place == number)

    def evict(self, table: PageTable, which: np.ndarray) -> None:
        """Take the pages at these indices from their sequences."""
        for number in np.unique(self.of_place[which]):
            place = self.places[number]
            table.drop(place.sequence, place.pool, self.pages[which[self.of_place[which] == number]])


def _pages(place: PagesOfSequence, is_open: bool) -> PageIds:
    if not is_open:
        return place.sequence.full_pages(place.pool)
    return place.sequence.open[place.sequence.open >= 0] if place.pool == PLAIN else np.zeros(0, dtype=np.int64)


def view_of(pool: PagePool, ids: PageIds, now: int) -> PageStats:
    """Return what policies see of pages `(n,)` of one pool, whichever sequences they belong to."""
    known = dict(zip(_COLUMNS[3:], _known(pool, ids), strict=True))
    del known["oldest"]
    return _view({**known, "lane": np.zeros(len(ids))}, now)


def _view(known: dict[str, np.ndarray], now: int) -> PageStats:
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
