"""The pages of one shard on disk: an append-only file of checked records.

Which record holds which page is known in memory only, and only once the record is written: what a failed write leaves
behind is never read, and cut off.

The file has no name and serves one cache as long as that lasts. A process that is forked meanwhile goes on reading from
it, and writes what is new to a file of its own. It is not synced: what the system could not write in the end is read
back as something else, and its checksum tells.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.process_generation import process_generation
from ..pages.pool_growth import MAX_FREE
from .file_records import (
    HEADER_BYTES,
    RECORD_HEADER_BYTES,
    FileHandle,
    PageFileError,
    Records,
    make_header,
    make_records,
)

#: A file is rewritten when more bytes than this, and than a fifth of those in use, belong to pages that are gone.
REWRITE_BYTES = 1 << 20

# A rewrite moves so many bytes at a time.
_REWRITE_BLOCK_BYTES = 8 << 20


class PageFile:
    """Pages of one shard of one pool on disk.

    Parameters
    ----------
    path : pathlib.Path
        A path in the folder to make it in, by which messages call it; see :class:`FileHandle`.
    page_bytes : int
        Of a page.
    fingerprint : int
        64 bits that tell this layout of a page from others.

    Raises
    ------
    PageFileError
        If the file cannot be made; nothing is left behind then.
    """

    def __init__(self, path: Path, page_bytes: int, fingerprint: int) -> None:
        self.path = path
        self.record_bytes = page_bytes + RECORD_HEADER_BYTES
        self.fingerprint = fingerprint
        self._index: dict[int, int] = {}
        # What the records of pages that got other numbers say they were.
        self._renumbered: dict[int, int] = {}
        self._written = 0
        # After a rewrite that failed the next one waits until there is more to gain.
        self._rewrite_beyond = REWRITE_BYTES
        self._handle = self._create(path)

    def __contains__(self, page: int) -> bool:
        return page in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def pages(self) -> list[int]:
        """The pages that have a record."""
        return list(self._index)

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._handle.descriptor

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self._written * self.record_bytes

    @property
    def dead_bytes(self) -> int:
        """Bytes of records whose pages are gone."""
        return (self._written - len(self._index)) * self.record_bytes

    def append(self, pages: Sequence[int] | np.ndarray, contents: np.ndarray) -> None:
        """Write pages that have no record yet.

        Parameters
        ----------
        pages : sequence of int
            n distinct pages.
        contents : numpy.ndarray
            `(n, page_bytes)` uint8.

        Raises
        ------
        PageFileError
            If not all could be written; the file is as before then.
        """
        assert self._handle.generation == process_generation(), "only the process that made a file writes to it"
        pages = np.asarray(pages, dtype=np.int64)
        if len(pages):
            self._write(self._handle, make_records(pages, contents, self._written, self.fingerprint), self._written)
            self._index.update(zip(pages.tolist(), range(self._written, self._written + len(pages)), strict=True))
            self._written += len(pages)

    def locate(self, pages: Sequence[int] | np.ndarray) -> Records:
        """Return where the records of pages are, to be read now or by another thread."""
        pages = np.asarray(pages, dtype=np.int64)
        numbers = np.array([self._index[page] for page in pages.tolist()], dtype=np.int64)
        written_as = np.array([self._renumbered.get(page, page) for page in pages.tolist()], dtype=np.int64)
        return Records(self._handle, pages, numbers, written_as, self.record_bytes, self.fingerprint)

    def read(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the bytes of pages, `(n, page_bytes)` uint8; see :meth:`Records.read`."""
        records = np.empty((len(pages), self.record_bytes), dtype=np.uint8)
        self.locate(pages).read(records)
        return records[:, RECORD_HEADER_BYTES:]

    def discard(self, pages: Iterable[int]) -> None:
        """Forget the records of pages that are gone."""
        for page in pages:
            self._index.pop(page, None)
            self._renumbered.pop(page, None)

    def renumber(self, number: Mapping[int, int]) -> None:
        """Follow pages to other numbers, by old one; others keep theirs."""
        self._renumbered = {number.get(page, page): self._renumbered.get(page, page) for page in self._index}
        self._index = {number.get(page, page): record for page, record in self._index.items()}

    def give_back(self) -> None:
        """Rewrite the file if much of it is of pages that are gone."""
        used = len(self._index) * self.record_bytes
        if self.dead_bytes > max(self._rewrite_beyond, used * MAX_FREE) and not self.rewrite():
            self._rewrite_beyond = 2 * self.dead_bytes

    def rewrite(self) -> bool:
        """Move the records in use to a new file in place of the old one; return whether that worked.

        As long as it takes there are both.
        Where it does not (a full disk, a record that is damaged) everything stays as it was.
        """
        pages = sorted(self._index, key=self._index.__getitem__)
        try:
            moved = self._create(self.path)
            for first in range(0, len(pages), step := max(1, _REWRITE_BLOCK_BYTES // self.record_bytes)):
                block = np.asarray(pages[first : first + step], dtype=np.int64)
                self._write(moved, make_records(block, self.read(block), first, self.fingerprint), first)
        except PageFileError:
            return False
        # Whoever reads from the old one keeps it open.
        self._handle = moved
        self._index = {page: number for number, page in enumerate(pages)}
        self._renumbered = {}
        self._written = len(pages)
        self._rewrite_beyond = REWRITE_BYTES
        return True

    def _create(self, path: Path) -> FileHandle:
        try:
            handle = FileHandle(path)
        except OSError as error:
            raise PageFileError(path, None, "a new file", str(error)) from error
        try:
            _write_all(handle.descriptor, make_header(self.record_bytes - RECORD_HEADER_BYTES, self.fingerprint), 0)
        except OSError as error:
            handle.close()
            raise PageFileError(path, None, f"room for a header of {HEADER_BYTES} bytes", str(error)) from error
        return handle

    def _write(self, handle: FileHandle, records: np.ndarray, first: int) -> None:
        """Write records to a file that has `first`; should that fail, cut the file back to these."""
        offset = HEADER_BYTES + first * self.record_bytes
        try:
            _write_all(handle.descriptor, records, offset)
        except OSError as error:
            # Where even this fails, the next write goes to the same place.
            with contextlib.suppress(OSError):
                os.ftruncate(handle.descriptor, offset)
            raise PageFileError(handle.path, None, f"room for {records.nbytes} bytes", str(error)) from error


def _write_all(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    left = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).data
    while len(left):
        # A full disk may take a part first, and fail only then.
        written = os.pwrite(descriptor, left, offset)
        if written <= 0:
            raise OSError(f"{written} of {len(left)} bytes written")
        left, offset = left[written:], offset + written
