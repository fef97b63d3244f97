"""Quest's bound as a scheduling policy: pages that recent queries could look at least go first."""

import dataclasses
from typing import ClassVar

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats, recent_shares


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
