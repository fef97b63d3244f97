"""AdaKV as a scheduling policy: KV heads compete for one budget by attention."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .base import POLICIES, SchedulingPolicy, check_range
from .page_stats import Floats, Integers, PageStats, mean_shares


@POLICIES.register("ada_kv")
@dataclasses.dataclass
class AdaKV(SchedulingPolicy):
    """KV heads compete for one budget by attention; each is sure of a part of its equal share (arXiv 2407.11550).

    What competes is each page's part of the attention that its lane's pages get (:func:`mean_shares`). A view should
    hold the pages of one sequence. The equal share is that of its pages: of a page or so more than remain
    while decoding, of more where a long prompt is cut down at once. Safeguarded pages go after all others.

    Parameters
    ----------
    alpha : float
        Share of the pages of an equal division that the heaviest pages of every lane are safe in.
    """

    per_head: ClassVar[bool] = True
    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 1)

    def priority(self, view: PageStats) -> Floats:
        _, lane = np.unique(view.lane, return_inverse=True)
        lanes = int(lane.max(initial=0)) + 1
        shares, _ = mean_shares(view)
        total = np.bincount(lane, shares, lanes)[lane]
        part = np.divide(shares, total, out=np.zeros(len(view)), where=total > 0)
        safe = _rank_in_lane(lane, -part, -view.newest) < int(self.alpha * len(view) / lanes)
        return np.where(safe, 2.0 + part, part)


def _rank_in_lane(lane: Integers, *keys: npt.NDArray[Any]) -> Integers:
    """Return the rank of each page within its lane, by the first key, then the next."""
    order = np.lexsort((*reversed(keys), lane))
    ordered = lane[order]
    rank = np.empty(len(lane), np.int64)
    rank[order] = np.arange(len(lane)) - np.searchsorted(ordered, ordered)
    return rank
