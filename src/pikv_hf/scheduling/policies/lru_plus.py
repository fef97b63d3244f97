"""LRU+ as a scheduling policy: LRU in which pages that matter age more slowly."""

import dataclasses

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats, mean_shares


@POLICIES.register("lru_plus")
@dataclasses.dataclass
class LRUPlus(SchedulingPolicy):
    """LRU in which pages used often and heavily age more slowly.

    The priority is minus the steps since the last use (plus one), divided by `(1 + uses) (1 + share / largest share)`
    of :func:`mean_shares`. The name is PiKV's (arXiv 2508.06526); the formula is this project's.
    """

    def priority(self, view: PageStats) -> Floats:
        shares, _ = mean_shares(view)
        weight = 1 + shares / (shares.max(initial=0.0) or 1.0)
        return -(view.step - view.last_use + 1) / ((1 + view.uses) * weight)
