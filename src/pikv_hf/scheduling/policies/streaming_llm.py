"""StreamingLLM as a scheduling policy: the oldest pages go first."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy
from .page_stats import Floats, PageStats


@POLICIES.register("streaming_llm")
@dataclasses.dataclass
class StreamingLLM(SchedulingPolicy):
    """Oldest positions first: what remains are sinks and the newest tokens (arXiv 2309.17453)."""

    def priority(self, view: PageStats) -> Floats:
        return view.newest.astype(np.float64)
