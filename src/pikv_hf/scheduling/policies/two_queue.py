"""2Q as a scheduling policy: a FIFO for pages used at most once, an LRU queue for the others."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy, check_range
from .page_stats import Floats, PageStats


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
