"""Note what a batch of samples costs while it runs: bytes, seconds and peaks."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.eval.runner.memory_meter import PeakMemory, stored_bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """What one sample, or one batch, cost.

    Attributes
    ----------
    kv_bytes_prefill, kv_bytes_end : int
        Live bytes of the cache after the context was read (and compressed), and after the answer.
    prefill_seconds : float
        To read and compress the context (with the question, in the query-aware protocol).
    decode_seconds : float
        To generate the tokens after the first.
    peak_memory_bytes : int
        Highest resident memory of the process meanwhile.
    cuda_peak_bytes : int or None
        Highest allocated GPU memory meanwhile; None without a GPU.
    """

    kv_bytes_prefill: int
    kv_bytes_end: int
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    cuda_peak_bytes: int | None


class Meter:
    """Marks the stages of a sample: `start`, `prefilled`, `decoding`, `finish`, in this order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = PeakMemory(device)

    def start(self) -> None:
        """Mark the start of the context."""
        self._peak.reset()
        self._prefilled_bytes = -1
        self._started = self._now()

    def prefilled(self, cache: Any) -> None:
        """Mark that the cache holds the context."""
        self._prefilled = self._now()
        self._prefilled_bytes = stored_bytes(cache)
        self._decoding = self._now()

    def decoding(self) -> None:
        """Mark that the first token of the answer is known."""
        self._decoding = self._now()

    def finish(self, cache: Any) -> Cost:
        """Mark the end of the answer."""
        ended = self._now()
        return Cost(
            kv_bytes_prefill=self._prefilled_bytes,
            kv_bytes_end=stored_bytes(cache),
            prefill_seconds=self._prefilled - self._started,
            decode_seconds=ended - self._decoding,
            peak_memory_bytes=self._peak.process_bytes(),
            cuda_peak_bytes=self._peak.cuda_bytes(),
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
