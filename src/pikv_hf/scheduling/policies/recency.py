"""Scheduling policies that ask how old a page is, and when it was used."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy, check_range
from .page_stats import Floats, PageStats, expected_distance


@POLICIES.register("streaming_llm")
@dataclasses.dataclass
class StreamingLLM(SchedulingPolicy):
    """Oldest positions first: what remains are sinks and the newest tokens (arXiv 2309.17453)."""

    def priority(self, view: PageStats) -> Floats:
        return view.newest.astype(np.float64)


@POLICIES.register("lru")
@dataclasses.dataclass
class LRU(SchedulingPolicy):
    """Least recently used first; being filled counts as a use.

    Where no use is recorded this is first in, first out: a circular buffer of the budget's size.
    """

    def priority(self, view: PageStats) -> Floats:
        return view.last_use.astype(np.float64)


@POLICIES.register("two_queue")
@dataclasses.dataclass
class TwoQueue(SchedulingPolicy):
    """2Q (Johnson and Shasha, VLDB 1994): pages used at most once wait in a FIFO, others in an LRU queue.

    While the FIFO has more than its share of the pages, its oldest go; then the least recently used of the others.
    Evicted pages do not return, so the ghost queue of 2Q has no counterpart: a second use is what promotes a page.

    Parameters
    ----------
    first_share : float
        Share of the pages that may be in the FIFO.
    """

    first_share: float = 0.25

    def __post_init__(self) -> None:
        check_range(self, "first_share", 0, 1)

    def priority(self, view: PageStats) -> Floats:
        n, often = len(view), view.uses >= 2
        order = np.lexsort((view.newest, np.where(often, view.last_use, view.born), often))
        first = n - int(often.sum())
        over = max(first - int(self.first_share * n), 0)
        rank = np.empty(n, np.float64)
        # The FIFO's surplus, then the LRU queue, then the rest of the FIFO.
        rank[np.concatenate([order[:over], order[first:], order[over:first]])] = np.arange(n)
        return rank


@POLICIES.register("reuse_distance")
@dataclasses.dataclass
class ReuseDistance(SchedulingPolicy):
    """Longest expected distance to the next use first (:func:`expected_distance`): Belady's rule on a prediction."""

    def priority(self, view: PageStats) -> Floats:
        return -expected_distance(view).astype(np.float64)
