"""What a pool keeps below fast memory: rows of the host's memory, and files."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ..common.process_generation import process_generation
from ..pages.types import PageIds
from .file_records import HEADER_BYTES, RECORD_HEADER_BYTES, Records, read_all
from .host_memory import HostMemory
from .page_file import PageFile
from .prefetched_pages import Prefetched, Read
from .record_layout import RecordLayout
from .tier_limits import LayerTiers, TierFull
from .transfers import Transfers

#: At most so much is read ahead of need for one pool.
PREFETCH_BYTES = 16 << 20


class LowerTiers:
    """The pages of a pool that are not, or not only, in fast memory.

    Pages never change, so that a page may be in several tiers at once; leaving a faster one then costs nothing.

    Parameters
    ----------
    layout : RecordLayout
        Of a page.
    tiers : LayerTiers
        Limits and counters.
    name : str
        Of the pool.
    device : torch.device
        Where attention runs.

    Attributes
    ----------
    prefetched : Prefetched
        The pages that were asked for ahead of need.
    """

    def __init__(self, layout: RecordLayout, tiers: LayerTiers, name: str, device: torch.device) -> None:
        self.layout = layout
        self._tiers, self._name = tiers, name
        self._transfers = Transfers(device)
        below = tiers.names[1:]
        self._to_disk = "disk" in below
        self._rows = HostMemory(layout.nbytes, tiers, self._transfers) if "cpu" in below else None
        # By shard, and by the process that made it: a forked one reads from the files that were there and makes others.
        self._files: dict[tuple[int, int], PageFile] = {}
        self._file_of: dict[int, PageFile] = {}
        self.prefetched = Prefetched(tiers.counters)

    # What is where

    def tier_of(self, page: int) -> str | None:
        """Return the fastest of these tiers that has a page."""
        if self._rows is not None and page in self._rows:
            return "cpu"
        return "disk" if page in self._file_of else None

    def pages(self, tier: str | None = None) -> PageIds:
        """Return the pages that a tier, or any of these tiers, has; some may come twice."""
        files = np.fromiter(self._file_of if tier in ("disk", None) else (), dtype=np.int64)
        return np.append(files, self._rows.pages) if self._rows is not None and tier in ("cpu", None) else files

    def nbytes(self, tier: str) -> int:
        """Return the bytes taken of a tier."""
        if tier == "cpu":
            return 0 if self._rows is None else self._rows.nbytes
        return sum(file.nbytes for file in self._files.values())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory of the host, with what is being read ahead."""
        rows = [] if self._rows is None else self._rows.tensors()
        return [*rows, *self.prefetched.tensors()]

    # Downwards

    def store(
        self, ids: PageIds, shards: np.ndarray, records: Callable[[list[int]], torch.Tensor], resident: np.ndarray
    ) -> None:
        """Take pages that leave fast memory.

        Parameters
        ----------
        ids, shards : numpy.ndarray
            `(n,)` page numbers, and `(N,)` the shards of all pages.
        records : callable
            Returns pages as records `(k, R)` on the device.
        resident : numpy.ndarray
            `(N,)` bool, the pages that stay in fast memory.

        Raises
        ------
        TierFull, PageFileError
            If there is no room, or a file cannot be written; nothing has left its place then.
        """
        wanted = [int(page) for page in ids if self._rows is None or page not in self._rows]
        room = 0 if self._rows is None else self._rows.free_rows()
        leaving = self._leaving_rows(len(wanted) - room, set(ids.tolist()), resident)
        to_rows, to_disk = wanted[: room + len(leaving)], wanted[room + len(leaving) :]
        moving = [page for page in leaving if not resident[page]]
        self._write_rows(moving, shards)
        self._write(to_disk, shards, records)
        if self._rows is not None and to_rows:
            self._rows.drop(leaving)
            self._transfers.to_rows(records(to_rows), self._rows.allocate(to_rows))
            self._moved(self._tiers.fast, "cpu", len(to_rows))

    def _leaving_rows(self, count: int, taken: set[int], resident: np.ndarray) -> list[int]:
        """Return pages to leave the host's memory: first those in fast memory too, then the least lately read."""
        if self._rows is None or count <= 0:
            return []
        pages = self._rows.pages
        pages = pages[~np.isin(pages, list(taken))]
        if not self._to_disk:
            pages = pages[resident[pages]]
        return pages[np.argsort(~resident[pages], kind="stable")][:count].tolist()

    def _write_rows(self, pages: list[int], shards: np.ndarray) -> None:
        pages = [page for page in pages if page not in self._file_of]
        if pages and self._rows is not None:
            self._transfers.finish()
            self._append(pages, shards, torch.stack([self._rows.row(page) for page in pages]))
            self._moved("cpu", "disk", len(pages))

    def _write(self, pages: list[int], shards: np.ndarray, records: Callable[[list[int]], torch.Tensor]) -> None:
        pages = [page for page in pages if page not in self._file_of]
        if pages and not self._to_disk:
            last = self._tiers.names[-1]
            raise TierFull(
                f"layer {self._tiers.index}: tier {last!r}, the last one, may hold {self._tiers.tiers.limits[last]} "
                f"bytes, {self._tiers.limit(last)} in each of {self._tiers.tiers.layers} layers; "
                f"{len(pages) * self.layout.nbytes} more are needed for {len(pages)} pages"
            )
        if pages:
            self._append(pages, shards, self._transfers.to_host(records(pages)))
            self._moved(self._tiers.fast, "disk", len(pages))

    def _append(self, pages: list[int], shards: np.ndarray, records: torch.Tensor) -> None:
        own, process = shards[pages], process_generation()
        new = [shard for shard in np.unique(own).tolist() if (shard, process) not in self._files]
        record_bytes = self.layout.nbytes + RECORD_HEADER_BYTES
        self._tiers.make_disk_room(len(pages) * record_bytes + len(new) * HEADER_BYTES)
        contents = records.numpy()
        for shard in np.unique(own).tolist():
            which = np.flatnonzero(own == shard)
            numbers = np.asarray(pages)[which]
            file = self._files.get((shard, process))
            if file is None:
                path = self._tiers.new_path(self._name, shard)
                file = self._files[shard, process] = PageFile(path, self.layout.nbytes, self.layout.fingerprint)
            file.append(numbers, contents[which])
            self._file_of.update(dict.fromkeys(numbers.tolist(), file))

    # Upwards

    def load(self, ids: PageIds) -> tuple[PageIds, torch.Tensor]:
        """Return pages, in any order, and their records `(n, R)` on the device; they stay where they are too.

        Raises
        ------
        PageFileError
            If a file does not have what was written to it.
        """
        with self._tiers.counters.stall():
            left: list[int] = ids.tolist()
            order: list[int] = []
            pieces: list[torch.Tensor] = []
            for read in (self.prefetched.take, self._read_rows, self._read_files):
                for tier, pages, records in read(left):
                    pieces.append(records)
                    order += pages
                    self._moved(tier, self._tiers.fast, len(pages))
                found = set(order)
                left = [page for page in left if page not in found]
            return np.array(order, dtype=np.int64), torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read_rows(self, wanted: list[int]) -> Iterator[Read]:
        """Yield those pages that the host's memory has."""
        if self._rows is not None and (pages := [page for page in wanted if page in self._rows]):
            records = self._transfers.to_device([self._rows.row(page) for page in pages]).get()
            for page in pages:
                self._rows.touch(page)
            yield "cpu", pages, records

    def _read_files(self, wanted: list[int]) -> Iterator[Read]:
        """Yield pages that are in files."""
        if wanted:
            parts = self._located(wanted)
            buffer = self._transfers.host(len(wanted), parts[0].record_bytes)
            read_all(parts, buffer.numpy())
            pages = [int(page) for part in parts for page in part.pages]
            yield "disk", pages, self._transfers.to_device([buffer]).get()[:, RECORD_HEADER_BYTES:]

    def _located(self, pages: list[int]) -> list[Records]:
        by_file: dict[int, list[int]] = {}
        for page in pages:
            by_file.setdefault(id(self._file_of[page]), []).append(page)
        return [self._file_of[own[0]].locate(own) for own in by_file.values()]

    # Ahead of need

    def prefetch(self, ids: PageIds) -> None:
        """Begin to read pages that will be wanted soon; what is too much is left out."""
        most = PREFETCH_BYTES // self.layout.nbytes - len(self.prefetched)
        pages = [page for page in ids.tolist() if page not in self.prefetched][: max(0, most)]
        rows = [page for page in pages if self._rows is not None and page in self._rows]
        if rows and self._rows is not None and self._transfers.is_asynchronous:
            self.prefetched.expect("cpu", rows, self._transfers.to_device([self._rows.row(page) for page in rows]))
        files = [page for page in pages if page not in set(rows) and page in self._file_of]
        if files:
            parts = self._located(files)
            reading = self._tiers.tiers.prefetch_thread.begin(parts, self._transfers)
            self.prefetched.expect("disk", [int(page) for part in parts for page in part.pages], reading)

    # Pages that are gone

    def drop(self, pages: Iterable[int]) -> None:
        """Forget pages."""
        gone = list(pages)
        if self._rows is not None:
            self._rows.drop(gone)
        self.prefetched.forget(gone)
        self.forget_records(gone)

    def forget_records(self, pages: Iterable[int]) -> None:
        """Forget what files have of pages that are gone or elsewhere too."""
        by_file: dict[int, tuple[PageFile, list[int]]] = {}
        for page in pages:
            if (file := self._file_of.pop(page, None)) is not None:
                by_file.setdefault(id(file), (file, []))[1].append(page)
        for file, own in by_file.values():
            file.discard(own)

    def renumber(self, kept: PageIds) -> None:
        """Follow pages to other numbers: `kept` `(n,)` are pages `0..n-1` from now on, and there are no others."""
        number = {old: new for new, old in enumerate(kept.tolist()) if old != new}
        if not number:
            return
        self._file_of = {number.get(page, page): file for page, file in self._file_of.items()}
        for file in self._files.values():
            file.renumber(number)
        if self._rows is not None:
            self._rows.renumber(number)
        self.prefetched.renumber(number)

    @property
    def dead_bytes(self) -> int:
        """Bytes of files that :meth:`compact` gives back."""
        return sum(file.dead_bytes for file in self._files.values())

    def compact(self) -> None:
        """Shorten files to the records in use; files without any go."""
        for made, file in list(self._files.items()):
            if not len(file):
                # Closed once nobody reads from it any more.
                del self._files[made]
            elif file.dead_bytes:
                file.rewrite()

    def give_back(self) -> None:
        """Shorten files, and move rows of the host's memory together, where much of them is of pages that are gone."""
        for shard, file in list(self._files.items()):
            if not len(file):
                del self._files[shard]
            else:
                file.give_back()
        if self._rows is not None:
            self._rows.give_back()

    def _moved(self, source: str, target: str, pages: int) -> None:
        self._tiers.counters.moved[source, target] += pages * self.layout.nbytes
