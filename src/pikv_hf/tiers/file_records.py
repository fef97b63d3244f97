"""Checked records of a page file: their format, and reading them, from any thread.

The file starts with a header of `HEADER_BYTES`: magic, layout version, bytes of a page, fingerprint of the layout (what
the bytes mean), checksum of the header. Records of equal size follow, each with

    checksum (8 bytes) | number of the record (8) | page (8) | fingerprint of the layout (8) | the page's bytes

where the checksum, xxh3 of 64 bits, covers everything after itself.
"""

import dataclasses
import os
import struct
import tempfile
import weakref
from pathlib import Path

import numpy as np
import xxhash

from ..common.process_generation import process_generation

MAGIC = b"PiKVpage"
LAYOUT_VERSION = 1

_HEADER = struct.Struct("<8sIIQQQ")
HEADER_BYTES = _HEADER.size

# Of a record: checksum, number, page, fingerprint, as integers of 64 bits.
_FIELDS = 4
RECORD_HEADER_BYTES = 8 * _FIELDS

# Most systems take no more buffers than this in one call.
_MAX_RECORDS_PER_CALL = 512


class PageFileError(RuntimeError):
    """A page could not be written, or what was read is not what was written.

    Attributes
    ----------
    path : pathlib.Path
        The file, which has no name where it is: its folder, and what it is for.
    page : int or None
        The page that was wanted, None if it concerns the file.
    expected, found : str
        What should be there and what is.
    """

    def __init__(self, path: Path, page: int | None, expected: str, found: str) -> None:
        where = f"{path}: " + ("" if page is None else f"page {page}: ")
        super().__init__(f"{where}expected {expected}, found {found}")
        self.path, self.page, self.expected, self.found = path, page, expected, found


class FileHandle:
    """An open file without a name, closed when nobody refers to it any more.

    The system gives the room of a file without a name back when the last process that has it open ends, however that
    comes about: killed processes leave nothing behind, and forked ones neither collide nor remove what another reads.
    Records never change, so that another thread, or a forked process, may read through a handle whatever happens to the
    file meanwhile.

    Parameters
    ----------
    path : pathlib.Path
        A path in the folder to make it in, by which messages call it.

    Attributes
    ----------
    descriptor : int
        Of the open file.
    generation : int
        The process that made it, and alone may write to it; see
        :func:`~pikv_hf.common.process_generation.process_generation`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.generation = path, process_generation()
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as file:
            self.descriptor = os.dup(file.fileno())
        self.close = weakref.finalize(self, os.close, self.descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """Where the records of some pages are. Stays valid, for any thread, when the file grows or is rewritten.

    Attributes
    ----------
    pages, numbers, written_as : numpy.ndarray
        `(n,)` int64, the pages, their records, and the pages that these name: pages may have got other numbers since.
    record_bytes, fingerprint : int
        What a record must have.
    """

    _handle: FileHandle
    pages: np.ndarray
    numbers: np.ndarray
    written_as: np.ndarray
    record_bytes: int
    fingerprint: int

    def read(self, out: np.ndarray) -> None:
        """Read and check the records.

        Parameters
        ----------
        out : numpy.ndarray
            `(n, record_bytes)` uint8, C-contiguous, in the order of the pages; the page's bytes begin after
            :data:`RECORD_HEADER_BYTES`.

        Raises
        ------
        PageFileError
            If the file is too short or cannot be read, or a record is not the one that was written.
        """
        self._check_header()
        # Reading into memory of our own rather than mapping the file: touching a mapped page beyond the end of a
        # truncated file kills the process (SIGBUS), where this call returns fewer bytes.
        order = np.argsort(self.numbers, kind="stable")
        breaks = np.flatnonzero(np.diff(self.numbers[order]) != 1) + 1
        for run in np.split(order, breaks):
            for first in range(0, len(run), _MAX_RECORDS_PER_CALL):
                self._read_run(run[first : first + _MAX_RECORDS_PER_CALL], out)
        for index in range(len(self.pages)):
            self._check(index, out[index])

    def _read_run(self, run: np.ndarray, out: np.ndarray) -> None:
        """Read neighbouring records into rows of `out` that need not be neighbours."""
        offset = HEADER_BYTES + int(self.numbers[run[0]]) * self.record_bytes if len(run) else 0
        buffers = [memoryview(out[index]) for index in run]
        wanted = len(run) * self.record_bytes
        try:
            got = os.preadv(self._handle.descriptor, buffers, offset) if wanted else 0
        except OSError as error:
            raise PageFileError(self._handle.path, int(self.pages[run[0]]), "its record", str(error)) from error
        if got < wanted:
            short = int(self.pages[run[got // self.record_bytes]])
            found = f"the end of the file after {offset + got}"
            raise PageFileError(self._handle.path, short, f"{offset + wanted} bytes", found)

    def _check_header(self) -> None:
        path, payload = self._handle.path, self.record_bytes - RECORD_HEADER_BYTES
        try:
            header = os.pread(self._handle.descriptor, HEADER_BYTES, 0)
        except OSError as error:
            raise PageFileError(path, None, "a readable file", str(error)) from error
        if header != (expected := make_header(payload, self.fingerprint)):
            raise PageFileError(path, None, f"the header {expected.hex()}", header.hex() or "an empty file")

    def _check(self, index: int, record: np.ndarray) -> None:
        path, page = self._handle.path, int(self.pages[index])
        checksum, number, of_page, fingerprint = record[:RECORD_HEADER_BYTES].view(np.uint64).tolist()
        expected = int(self.numbers[index]), int(self.written_as[index]), self.fingerprint
        if (number, of_page, fingerprint) != expected:
            raise PageFileError(
                path,
                page,
                "record {}, page {}, layout {:016x}".format(*expected),
                f"record {number}, page {of_page}, layout {fingerprint:016x}",
            )
        if (actual := _digest(record)) != checksum:
            raise PageFileError(path, page, f"checksum {checksum:016x}", f"{actual:016x}")


def read_all(parts: list[Records], buffer: np.ndarray) -> None:
    """Read records into the rows of a buffer `(n, record_bytes)`, part after part."""
    first = 0
    for part in parts:
        part.read(buffer[first : first + len(part.pages)])
        first += len(part.pages)


def make_records(pages: np.ndarray, contents: np.ndarray, first: int, fingerprint: int) -> np.ndarray:
    """Return the records of pages `(n,)`, `(n, record_bytes)` uint8, numbered from `first`."""
    records = np.empty((len(pages), contents.shape[1] + RECORD_HEADER_BYTES), dtype=np.uint8)
    records[:, RECORD_HEADER_BYTES:] = contents
    fields = np.empty((len(pages), _FIELDS), dtype=np.uint64)
    fields[:, 1], fields[:, 2] = np.arange(first, first + len(pages)), pages
    fields[:, 3] = fingerprint
    records[:, :RECORD_HEADER_BYTES] = fields.view(np.uint8)
    digests = np.array([_digest(record) for record in records], dtype=np.uint64)
    records[:, :8] = digests[:, None].view(np.uint8)
    return records


def make_header(page_bytes: int, fingerprint: int) -> bytes:
    """Return the header of a file of such pages."""
    bare = _HEADER.pack(MAGIC, LAYOUT_VERSION, HEADER_BYTES, page_bytes, fingerprint, 0)[:-8]
    return bare + struct.pack("<Q", xxhash.xxh3_64_intdigest(bare))


def _digest(record: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(record.data[8:])
