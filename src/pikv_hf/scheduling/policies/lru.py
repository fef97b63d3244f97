"""LRU as a scheduling policy: the least recently used pages go first."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats


@POLICIES.register("lru")
@dataclasses.dataclass
class LRU(SchedulingPolicy):
    """Least recently used first; being filled counts as a use.

    Where no use is recorded this is first in, first out: a circular buffer of the budget's size.
    """

    def priority(self, view: PageStats) -> Floats:
        return view.last_use.astype(np.float64)
