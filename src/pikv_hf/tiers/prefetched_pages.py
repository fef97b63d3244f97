"""Prefetched pages: the thread that reads files before a page is needed, and what is on its way to the device."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..common.process_generation import process_generation
from .file_records import RECORD_HEADER_BYTES, Records, read_all
from .tier_counters import TierCounters
from .transfers import Arriving, Transfers

#: Pages that were read: the tier they come from, their numbers, and their records `(n, R)` on the device.
Read = tuple[str, list[int], torch.Tensor]


class Reading:
    """Records that the thread reads from files into memory of the host, and that go on to the device from there.

    Made by :meth:`PrefetchThread.begin`. In a process that was forked meanwhile nobody reads them to the end.
    """

    def __init__(self, buffer: torch.Tensor, done: "Future[None]", transfers: Transfers) -> None:
        self._buffer, self._done, self._transfers = buffer, done, transfers
        self._generation = process_generation()
        self._arriving: Arriving | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self._buffer]

    @property
    def _is_own(self) -> bool:
        """Whether this process began it; else its thread may have held any lock of `_done` when it was forked."""
        return self._generation == process_generation()

    def forward(self) -> None:
        """Let what has been read go on to the device."""
        if self._arriving is None and self._is_own and self._done.done() and self._done.exception() is None:
            self._arriving = self._transfers.to_device([self._buffer])

    def get(self) -> torch.Tensor:
        """Return the records `(n, R)` on the device, in order of the parts.

        Raises what reading them raised, `RuntimeError` if another process was reading them.
        """
        if self._arriving is None:
            if not self._is_own:
                raise RuntimeError(
                    "the thread that read these pages stayed in the process that this one was forked from"
                )
            self._done.result()
            self.forward()
        assert self._arriving is not None
        return self._arriving.get()[:, RECORD_HEADER_BYTES:]


class PrefetchThread:
    """The thread that reads files ahead of need, for all layers of a cache; a process's first request starts it."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._generation = process_generation()
        self._readings: weakref.WeakSet[Reading] = weakref.WeakSet()

    def begin(self, parts: list[Records], transfers: Transfers) -> Reading:
        """Begin to read records, which go on to the device by `transfers`."""
        if self._worker is None or self._generation != process_generation():
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="pikv-tiers")
            self._generation = process_generation()
            weakref.finalize(self, _shut_down, self._worker, self._generation)
        buffer = transfers.host(sum(len(part.pages) for part in parts), parts[0].record_bytes)
        reading = Reading(buffer, self._worker.submit(read_all, parts, buffer.numpy()), transfers)
        self._readings.add(reading)
        return reading

    def forward(self) -> None:
        """Let all that has been read go on to the device, beside the computation."""
        for reading in list(self._readings):
            reading.forward()


def _shut_down(worker: ThreadPoolExecutor, generation: int) -> None:
    # Of another process, its locks may be held for ever.
    if generation == process_generation():
        worker.shutdown(wait=False, cancel_futures=True)


class Prefetched:
    """Pages of a pool that were asked for ahead of need, on their way to the device.

    Parameters
    ----------
    counters : TierCounters
        Count what was asked for, used and wasted.
    """

    def __init__(self, counters: TierCounters) -> None:
        self._counters = counters
        # From which tier each page comes, where it arrives, and as which record there.
        self._coming: dict[int, tuple[str, Reading | Arriving, int]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._coming

    def __len__(self) -> int:
        return len(self._coming)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory of the host."""
        readings = {id(part): part for _, part, _ in self._coming.values() if isinstance(part, Reading)}
        return [tensor for reading in readings.values() for tensor in reading.tensors()]

    def expect(self, tier: str, pages: list[int], part: Reading | Arriving) -> None:
        """Have pages come from a tier, as records of a part in this order."""
        self._coming.update({page: (tier, part, row) for row, page in enumerate(pages)})
        self._counters.issued += len(pages)

    def take(self, wanted: Iterable[int]) -> Iterator[Read]:
        """Yield those wanted pages that come; they count as used.

        Pages that could not be read are left out: whether the error lasts shows when they are read again.
        """
        found = {page: self._coming.pop(page) for page in wanted if page in self._coming}
        for tier, part in {id(part): (tier, part) for tier, part, _ in found.values()}.values():
            mine = [page for page, (_, own, _) in found.items() if own is part]
            rows = [found[page][2] for page in mine]
            try:
                records = part.get()
            except (RuntimeError, OSError):
                self._counters.wasted += len(mine)
                continue
            if rows != list(range(len(records))):
                records = records.index_select(0, torch.tensor(rows, device=records.device))
            self._counters.used += len(mine)
            yield tier, mine, records

    def renumber(self, number: Mapping[int, int]) -> None:
        """Follow pages to other numbers, by old one; others keep theirs."""
        self._coming = {number.get(page, page): where for page, where in self._coming.items()}

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Give up pages, by default all; they count as wasted."""
        gone = list(self._coming) if pages is None else [page for page in pages if page in self._coming]
        for page in gone:
            del self._coming[page]
        self._counters.wasted += len(gone)
