"""What moving pages between tiers has cost: hits, misses, bytes, waiting."""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(slots=True)
class TierCounters:
    """Counts of one cache, of all its layers and forks.

    Attributes
    ----------
    hits, misses : int
        Pages that attention read: those that were in fast memory, and those that were not.
    promoted, demoted : int
        Pages that moved into fast memory to stay there, and out of it.
    moved : dict
        Bytes of K/V copied by `(from, to)`, names of tiers.
    stall_seconds : float
        Time in which attention waited for pages. On CUDA, copies to the device wait in their stream and do not count.
    issued, used, wasted : int
        Pages read ahead of need, those that were then asked for, and those that were not.
    """

    hits: int = 0
    misses: int = 0
    promoted: int = 0
    demoted: int = 0
    moved: dict[tuple[str, str], int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    stall_seconds: float = 0.0
    issued: int = 0
    used: int = 0
    wasted: int = 0

    def count_reads(self, hits: int, misses: int) -> None:
        """Count pages that attention read."""
        self.hits += hits
        self.misses += misses

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """Count the time of the block as waiting."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """Return what was counted as plain values."""
        reads = self.hits + self.misses
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / reads if reads else None,
            "promoted": self.promoted,
            "demoted": self.demoted,
            "bytes_moved": {f"{source}->{target}": moved for (source, target), moved in self.moved.items()},
            "stall_seconds": self.stall_seconds,
            "prefetches": {"issued": self.issued, "used": self.used, "wasted": self.wasted},
        }
