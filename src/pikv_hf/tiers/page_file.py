"""The pages of one shard on disk: an append-only file of checked records.

The file starts with a header of `HEADER_BYTES`: magic, layout version, bytes of a page, fingerprint of the layout (what
the bytes mean), checksum of the header. Records of equal size follow, each with

    checksum (8 bytes) | number of the record (8) | page (8) | fingerprint of the layout (8) | the page's bytes

where the checksum, xxh3 of 64 bits, covers everything after itself. Which record holds which page is known in memory
only, and only once the record is written: what a failed write leaves behind is never read, and cut off.

The file serves one cache of one process as long as they last. It is not synced: what the system could not write in the
end is read back as something else, and its checksum tells.
"""

import contextlib
import dataclasses
import itertools
import os
import struct
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

MAGIC = b"PiKVpage"
LAYOUT_VERSION = 1

_HEADER = struct.Struct("<8sIIQQQ")
HEADER_BYTES = _HEADER.size

# Of a record: checksum, number, page, fingerprint, as integers of 64 bits.
_FIELDS = 4
RECORD_HEADER_BYTES = 8 * _FIELDS

#: A file is rewritten when more than half of its records, and more bytes than this, belong to pages that are gone.
REWRITE_BYTES = 1 << 20

# A rewrite moves so many bytes at a time.
_REWRITE_BLOCK_BYTES = 8 << 20

# Most systems take no more buffers than this in one call.
_MAX_RECORDS_PER_CALL = 512


class PageFileError(RuntimeError):
    """A page could not be written, or what was read is not what was written.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    page : int or None
        The page that was wanted, None if it concerns the file.
    expected, found : str
        What should be there and what is.
    """

    def __init__(self, path: Path, page: int | None, expected: str, found: str) -> None:
        where = f"{path}: " + ("" if page is None else f"page {page}: ")
        super().__init__(f"{where}expected {expected}, found {found}")
        self.path, self.page, self.expected, self.found = path, page, expected, found


class _Handle:
    """An open file that is closed and removed when nobody refers to it any more.

    Records never change, so that another thread may read through a handle whatever happens to the file meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.close = weakref.finalize(self, _close_and_remove, self.descriptor, path)


def _close_and_remove(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    # The directory may be gone, and with it the name.
    with contextlib.suppress(OSError):
        path.unlink()


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """Where the records of some pages are. Stays valid, for any thread, when the file grows or is rewritten.

    Attributes
    ----------
    pages, numbers : numpy.ndarray
        `(n,)` int64, the pages and their records.
    record_bytes, fingerprint : int
        What a record must have.
    """

    _handle: _Handle
    pages: np.ndarray
    numbers: np.ndarray
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
        if header != (expected := _header(payload, self.fingerprint)):
            raise PageFileError(path, None, f"the header {expected.hex()}", header.hex() or "an empty file")

    def _check(self, index: int, record: np.ndarray) -> None:
        path, page = self._handle.path, int(self.pages[index])
        checksum, number, of_page, fingerprint = record[:RECORD_HEADER_BYTES].view(np.uint64).tolist()
        expected = int(self.numbers[index]), page, self.fingerprint
        if (number, of_page, fingerprint) != expected:
            raise PageFileError(
                path,
                page,
                "record {}, page {}, layout {:016x}".format(*expected),
                f"record {number}, page {of_page}, layout {fingerprint:016x}",
            )
        if (actual := _digest(record)) != checksum:
            raise PageFileError(path, page, f"checksum {checksum:016x}", f"{actual:016x}")


class PageFile:
    """Pages of one shard of one pool on disk.

    Parameters
    ----------
    path : pathlib.Path
        A file that does not exist yet; it is removed with this object. Rewritten files have names of their own beside
        it.
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
        self._generations = itertools.count(1)
        self._index: dict[int, int] = {}
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
        pages = np.asarray(pages, dtype=np.int64)
        if len(pages):
            self._write(self._handle, self._records(pages, contents, self._written), self._written)
            self._index.update(zip(pages.tolist(), range(self._written, self._written + len(pages)), strict=True))
            self._written += len(pages)

    def locate(self, pages: Sequence[int] | np.ndarray) -> Records:
        """Return where the records of pages are, to be read now or by another thread."""
        pages = np.asarray(pages, dtype=np.int64)
        numbers = np.array([self._index[page] for page in pages.tolist()], dtype=np.int64)
        return Records(self._handle, pages, numbers, self.record_bytes, self.fingerprint)

    def read(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the bytes of pages, `(n, page_bytes)` uint8; see :meth:`Records.read`."""
        records = np.empty((len(pages), self.record_bytes), dtype=np.uint8)
        self.locate(pages).read(records)
        return records[:, RECORD_HEADER_BYTES:]

    def discard(self, pages: Iterable[int]) -> None:
        """Forget the records of pages that are gone; the file is rewritten once most of it is of such."""
        for page in pages:
            self._index.pop(page, None)
        if self.dead_bytes > self._rewrite_beyond and 2 * len(self._index) < self._written and not self.rewrite():
            self._rewrite_beyond = 2 * self.dead_bytes

    def rewrite(self) -> bool:
        """Move the records in use to a new file and remove the old one; return whether that worked.

        As long as it takes there are both.
        Where it does not (a full disk, a record that is damaged) everything stays as it was.
        """
        pages = sorted(self._index, key=self._index.__getitem__)
        try:
            moved = self._create(self.path.with_name(f"{self.path.name}.{next(self._generations)}"))
            for first in range(0, len(pages), step := max(1, _REWRITE_BLOCK_BYTES // self.record_bytes)):
                block = np.asarray(pages[first : first + step], dtype=np.int64)
                self._write(moved, self._records(block, self.read(block), first), first)
        except PageFileError:
            return False
        old, self._handle = self._handle, moved
        self._index = {page: number for number, page in enumerate(pages)}
        self._written = len(pages)
        self._rewrite_beyond = REWRITE_BYTES
        # Open descriptors go on reading; only the name goes.
        with contextlib.suppress(OSError):
            old.path.unlink()
        return True

    def _create(self, path: Path) -> _Handle:
        try:
            handle = _Handle(path)
        except OSError as error:
            raise PageFileError(path, None, "a new file", str(error)) from error
        try:
            _write_all(handle.descriptor, _header(self.record_bytes - RECORD_HEADER_BYTES, self.fingerprint), 0)
        except OSError as error:
            handle.close()
            raise PageFileError(path, None, f"room for a header of {HEADER_BYTES} bytes", str(error)) from error
        return handle

    def _records(self, pages: np.ndarray, contents: np.ndarray, first: int) -> np.ndarray:
        """Return records `(n, record_bytes)`, numbered from `first`."""
        records = np.empty((len(pages), self.record_bytes), dtype=np.uint8)
        records[:, RECORD_HEADER_BYTES:] = contents
        fields = np.empty((len(pages), _FIELDS), dtype=np.uint64)
        fields[:, 1], fields[:, 2] = np.arange(first, first + len(pages)), pages
        fields[:, 3] = self.fingerprint
        records[:, :RECORD_HEADER_BYTES] = fields.view(np.uint8)
        digests = np.array([_digest(record) for record in records], dtype=np.uint64)
        records[:, :8] = digests[:, None].view(np.uint8)
        return records

    def _write(self, handle: _Handle, records: np.ndarray, first: int) -> None:
        """Write records to a file that has `first`; should that fail, cut the file back to these."""
        offset = HEADER_BYTES + first * self.record_bytes
        try:
            _write_all(handle.descriptor, records, offset)
        except OSError as error:
            # Where even this fails, the next write goes to the same place.
            with contextlib.suppress(OSError):
                os.ftruncate(handle.descriptor, offset)
            raise PageFileError(handle.path, None, f"room for {records.nbytes} bytes", str(error)) from error


def _header(page_bytes: int, fingerprint: int) -> bytes:
    bare = _HEADER.pack(MAGIC, LAYOUT_VERSION, HEADER_BYTES, page_bytes, fingerprint, 0)[:-8]
    return bare + struct.pack("<Q", xxhash.xxh3_64_intdigest(bare))


def _digest(record: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(record.data[8:])


def _write_all(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    left = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).data
    while len(left):
        # A full disk may take a part first, and fail only then.
        written = os.pwrite(descriptor, left, offset)
        if written <= 0:
            raise OSError(f"{written} of {len(left)} bytes written")
        left, offset = left[written:], offset + written
