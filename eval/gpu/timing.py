"""Time calls on a GPU by events, with nothing of theirs in the L2 cache."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Bytes read before every timed call: several times the L2 of any GPU, and work enough for the GPU to be busy while the
#: processor queues the call, so that what is timed is not the queuing. Written bytes would stay in the L2 to be written
#: back during the call, and be counted as the call's.
FLUSH_BYTES = 2 << 30

#: Timed calls of a case, and the seconds to spend on them.
LEAST_CALLS, MOST_CALLS, SECONDS = 10, 60, 0.3


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of repeated calls: the 20th, 50th and 80th percentile, and how many calls there were."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    calls: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Timing":
        """Summarise measured milliseconds."""
        ordered = sorted(milliseconds)
        p20, p50, p80 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80, len(ordered))


#: Times a call: takes it and the most calls to time, returns what they took.
Stopwatch = Callable[..., Timing]


class CudaStopwatch:
    """Times calls on the current CUDA device by events, with nothing of theirs left in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 4, device=device)

    def __call__(self, call: Callable[[], Any], most: int = MOST_CALLS) -> Timing:
        """Warm up, then time at most `most` calls."""
        call()
        torch.cuda.synchronize()
        single = self._timed(call, 3)[-1]
        calls = int(SECONDS * 1000 / max(single, 1e-3))
        return Timing.of(self._timed(call, min(most, max(LEAST_CALLS, min(MOST_CALLS, calls)))))

    def _timed(self, call: Callable[[], Any], calls: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in marks:
            self._flush.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]
