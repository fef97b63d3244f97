"""Copies of pages, as rows of bytes, between the memory of the host and that of a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Transfers:
    """Copies pages, as rows of bytes, in both directions; on CUDA beside the computation, elsewhere at once.

    On CUDA all copies are made on one stream of their own, from and to pinned memory, so that they keep their order: a
    row of the host is not overwritten before it has been read. Frames themselves are only read and written by the
    stream that computes. So two waits are enough: copies to the host wait until that stream has collected the pages
    (:meth:`to_rows`), and it waits until copies to the device are there (:meth:`Arriving.get`).

    Parameters
    ----------
    device : torch.device
        Where attention runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_asynchronous(self) -> bool:
        """Whether copies run beside the computation."""
        return self._stream is not None

    def host(self, rows: int, columns: int) -> torch.Tensor:
        """Return uninitialised bytes `(rows, columns)` of the host from which copies are fast."""
        return torch.empty((rows, columns), dtype=torch.uint8, pin_memory=self._stream is not None)

    def to_rows(self, records: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Begin to copy records `(n, R)` of the device to n rows `(R,)` of the host. See :meth:`finish`."""
        with self._copying(after_compute=True):
            for record, row in zip(records, rows, strict=True):
                row.copy_(record, non_blocking=True)
        if self._stream is not None:
            # Its memory must not be given to others before the copy is made.
            records.record_stream(self._stream)

    def to_host(self, records: torch.Tensor) -> torch.Tensor:
        """Return records `(n, R)` of the device as ones of the host, complete."""
        if self._stream is None:
            return records
        rows = self.host(*records.shape)
        self.to_rows(records, list(rows))
        self.finish()
        return rows

    def to_device(self, rows: list[torch.Tensor]) -> "Arriving":
        """Begin to copy rows of the host, `(k, R)` or `(R,)` each, to the device, one after another."""
        rows = [row if row.dim() == 2 else row[None] for row in rows]
        if self._stream is None:
            return Arriving(torch.cat(rows) if len(rows) > 1 else rows[0], None)
        with self._copying(after_compute=False):
            records = torch.empty((sum(map(len, rows)), rows[0].shape[1]), dtype=torch.uint8, device=self.device)
            first = 0
            for row in rows:
                records[first : first + len(row)].copy_(row, non_blocking=True)
                first += len(row)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arriving(records, event)

    def finish(self) -> None:
        """Wait until all copies to the host are complete, before the host reads them."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _copying(self, after_compute: bool) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        if after_compute:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield


class Arriving:
    """Records on their way to the device.

    Parameters
    ----------
    records : torch.Tensor
        `(n, R)` uint8 on the device.
    event : torch.cuda.Event, optional
        What to wait for, None if they are there.
    """

    def __init__(self, records: torch.Tensor, event: "torch.cuda.Event | None") -> None:
        self._records, self._event = records, event

    def get(self) -> torch.Tensor:
        """Return the records for use by the current stream, which waits for them; the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._records.device)
            stream.wait_event(self._event)
            # Made on the other stream: its memory must not go back there before this one has read it.
            self._records.record_stream(stream)
        return self._records
