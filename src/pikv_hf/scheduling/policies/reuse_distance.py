"""Reuse distance as a scheduling policy: pages expected to be used last go first."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats, expected_distance


@POLICIES.register("reuse_distance")
@dataclasses.dataclass
class ReuseDistance(SchedulingPolicy):
    """Longest expected distance to the next use first (:func:`expected_distance`): Belady's rule on a prediction."""

    def priority(self, view: PageStats) -> Floats:
        return -expected_distance(view).astype(np.float64)
