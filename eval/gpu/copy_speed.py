"""Measure the bandwidth of a large copy, which kernels are compared with, and hold what every measurement needs."""

import dataclasses
from typing import Any

import torch

from pikv_hf.eval.gpu.arena import Arena
from pikv_hf.eval.gpu.time_limit import NO_TIME, TimeLimit
from pikv_hf.eval.gpu.timing import Stopwatch, Timing

#: Bytes of the tensor whose copy gives the bandwidth that the kernels are compared with, if so much is there.
COPIED_BYTES = 4 << 30

#: Bytes of an arena left for the alignment of the tensors of a case.
PADDING = 1 << 14

#: Tokens of a page: the cache's default.
PAGE_SIZE = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where and how to measure.

    Attributes
    ----------
    device : torch.device
        Of the tensors.
    backend : str
        Forced on the kernels.
    arena : Arena
        Memory for keys and values, all of which a case may take.
    stopwatch : callable
        Times a call.
    copy_gb_per_s : float
        The bandwidth of :func:`copy_speed`.
    """

    device: torch.device
    backend: str
    arena: Arena
    stopwatch: Stopwatch
    copy_gb_per_s: float

    def too_large(self, size: int) -> str:
        """Return the reason for not measuring what needs `size` bytes, empty if it fits."""
        room = self.arena.size - PADDING
        return f"needs {size / 1e9:.0f} GB, {room / 1e9:.0f} GB are free" if size > room else ""


def obstacle(bench: Bench, size: int, time_limit: TimeLimit) -> str:
    """Return why a case of `size` bytes cannot be measured now, empty if it can."""
    return NO_TIME if time_limit.is_spent() else bench.too_large(size)


@dataclasses.dataclass(frozen=True, slots=True)
class CopySpeed:
    """A device-to-device copy: bytes of the tensor copied, and the bandwidth over bytes read plus bytes written."""

    bytes_copied: int
    timing: Timing
    gb_per_s: float


def copy_speed(arena: Arena, stopwatch: Stopwatch, most: int = COPIED_BYTES) -> CopySpeed:
    """Copy half of an arena, or `most` bytes, to the other half."""
    arena.reset()
    size = min(most, arena.size // 2 - 512)
    source, target = (arena.take(size, dtype=torch.uint8) for _ in range(2))
    source.fill_(85)
    timing = stopwatch(lambda: target.copy_(source))
    return CopySpeed(size, timing, gb_per_s(2 * size, timing))


def gb_per_s(size: int, timing: Timing) -> float:
    """Return 10**9 bytes per second at the median time."""
    return size / timing.p50_ms / 1e6


def as_row(result: Any) -> dict[str, Any]:
    """Return a dataclass as a flat JSON object, its timing's figures beside the others."""
    row = dataclasses.asdict(result)
    if "timing" in row:
        row |= row.pop("timing") or dict.fromkeys((field.name for field in dataclasses.fields(Timing)), None)
    return row
