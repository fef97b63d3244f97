"""Reading pages from files ahead of need, on a thread of its own."""

import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .file_records import RECORD_HEADER_BYTES, Records, read_all
from .transfers import Arriving, Transfers


class Reading:
    """Records that the thread reads from files into memory of the host, and that go on to the device from there.

    Made by :meth:`ReadAhead.begin`.
    """

    def __init__(self, buffer: torch.Tensor, done: "Future[None]", transfers: Transfers) -> None:
        self._buffer, self._done, self._transfers = buffer, done, transfers
        self._arriving: Arriving | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self._buffer]

    def forward(self) -> None:
        """Let what has been read go on to the device."""
        if self._arriving is None and self._done.done() and self._done.exception() is None:
            self._arriving = self._transfers.to_device([self._buffer])

    def get(self) -> torch.Tensor:
        """Return the records `(n, R)` on the device, in order of the parts. Raises what reading them raised."""
        self._done.result()
        self.forward()
        assert self._arriving is not None
        return self._arriving.get()[:, RECORD_HEADER_BYTES:]


class ReadAhead:
    """The thread that reads files ahead of need, for all layers of a cache; it starts with the first request."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._readings: weakref.WeakSet[Reading] = weakref.WeakSet()

    def begin(self, parts: list[Records], transfers: Transfers) -> Reading:
        """Begin to read records, which go on to the device by `transfers`."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="pikv-tiers")
            weakref.finalize(self, self._worker.shutdown, wait=False, cancel_futures=True)
        buffer = transfers.host(sum(len(part.pages) for part in parts), parts[0].record_bytes)
        reading = Reading(buffer, self._worker.submit(read_all, parts, buffer.numpy()), transfers)
        self._readings.add(reading)
        return reading

    def forward(self) -> None:
        """Let all that has been read go on to the device, beside the computation."""
        for reading in list(self._readings):
            reading.forward()
