"""DuoAttention as a scheduling policy: pages of streaming heads go first."""

import dataclasses
from typing import ClassVar

import numpy as np

from .base import POLICIES, SchedulingPolicy, check_range
from .page_stats import Floats, PageStats


@POLICIES.register("duo")
@dataclasses.dataclass
class Duo(SchedulingPolicy):
    """Pages of streaming heads first, oldest first; then those of retrieval heads, least recently used first.

    DuoAttention (arXiv 2410.10819) trains a gate per head. Nothing is trained here: a lane is a streaming head while
    its pages, which leave out sinks, window and unfilled pages, take little of its attention, on average over the
    steps since its oldest page was filled.

    Parameters
    ----------
    little : float
        Share of a lane's attention below which it is a streaming head.
    """

    per_head: ClassVar[bool] = True
    little: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "little", 0, 1)

    def priority(self, view: PageStats) -> Floats:
        _, lane = np.unique(view.lane, return_inverse=True)
        oldest = np.full(lane.max(initial=0) + 1, view.step)
        np.minimum.at(oldest, lane, view.born)
        outside = np.bincount(lane, view.mass, len(oldest)) / np.maximum(view.step - oldest, 1)
        after = view.newest.max(initial=0) + 1
        streaming = (outside < self.little)[lane]
        return np.where(streaming, view.newest, after + view.last_use).astype(np.float64)
