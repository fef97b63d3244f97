"""Scheduling policies that ask how much attention a page took, or may take."""

import dataclasses
from typing import ClassVar

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats, mean_shares, recent_shares


@POLICIES.register("h2o")
@dataclasses.dataclass
class H2O(SchedulingPolicy):
    """Least accumulated attention first (arXiv 2306.14048), by page where the paper has tokens.

    Parameters
    ----------
    per_step : bool
        Compare means per step (:func:`mean_shares`). The paper's sums, False, let every new page go at once here, where
        pages are counted from when they left the window: with a quarter of the pages of 2,048 tokens, 47% of the
        attention was lost instead of 36% (`eval/results/page-traces.json`).
    """

    per_step: bool = True

    def priority(self, view: PageStats) -> Floats:
        return mean_shares(view)[0] if self.per_step else view.mass


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


@POLICIES.register("quest")
@dataclasses.dataclass
class Quest(SchedulingPolicy):
    """Lowest upper bound of recent queries' logits first; without bounds, least recent attention first.

    The bound is the one by which Quest (arXiv 2406.10774) chooses what to read; it evicts nothing. Recent attention is
    that of :func:`recent_shares`.
    """

    wants_bounds: ClassVar[bool] = True

    def priority(self, view: PageStats) -> Floats:
        return recent_shares(view)[0] if view.bounds is None else view.bounds
