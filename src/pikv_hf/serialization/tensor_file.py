"""Files of named tensors in the safetensors format that are complete, unharmed and replaced as a whole, or not at all.

Beside safetensors' own rules, `__metadata__` holds a checksum (XXH3, 64 bits) of each tensor's bytes and one of the
header, computed with its own digits as zeros. Any changed byte and any missing one is found.
"""

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The same limit as safetensors': no header of ours comes near it.
_MOST_HEADER = 100_000_000
_NO_CHECKSUM = "0" * 16


class CacheFileError(ValueError):
    """A file that is no saved cache, is damaged, or does not fit the model or this release."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """What a file says of a tensor.

    Attributes
    ----------
    dtype : torch.dtype
        One of those above.
    shape : tuple of int
        Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are made and written together, some of their first dimension at a time.

    Attributes
    ----------
    specs : dict of str to Spec
        By name.
    pieces : callable
        Yields lists of tensors, one for each name, which follow one another along dimension 0.
    """

    specs: dict[str, Spec]
    pieces: Callable[[], Iterator[Sequence[torch.Tensor]]]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Group":
        """Return a group of tensors that are there."""
        whole = dict(tensors)
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in whole.items()}
        return cls(specs, lambda: iter([list(whole.values())]))


# Writing


def write_tensors(path: Path, metadata: Mapping[str, str], groups: Sequence[Group]) -> None:
    """Write a file, in place of one that may be there.

    Parameters
    ----------
    path : Path
        Its folder must exist. The file appears, or is replaced, when all is on disk.
    metadata : dict of str to str
        Goes into `__metadata__`.
    groups : sequence of Group
        What to write; no more than one piece is held in memory.

    Raises
    ------
    OSError
        If anything could not be written. What was there is as it was, and nothing else is left.
    """
    specs = {name: spec for group in groups for name, spec in group.specs.items()}
    # Wide numbers first, as safetensors has them: every tensor is then aligned to its own.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    ends = dict(zip(order, _cumulative([specs[name].nbytes for name in order]), strict=True))
    table = {
        name: {
            "dtype": _NAMES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [ends[name] - specs[name].nbytes, ends[name]],
        }
        for name in order
    }
    # Checksums are known at the end, and take as many digits as these.
    start = len(_header(table, metadata, dict.fromkeys(order, _NO_CHECKSUM)))
    with _named(path), _replacing(path) as file:
        checksums: dict[str, str] = {}
        for group in groups:
            checksums |= _write_group(file, group, {n: start + ends[n] - specs[n].nbytes for n in group.specs})
        header = _header(table, metadata, {name: checksums[name] for name in order})
        assert len(header) == start
        file.seek(0)
        _write(file, header)


def _cumulative(sizes: Sequence[int]) -> list[int]:
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    return ends


def _header(table: Mapping[str, Any], metadata: Mapping[str, str], checksums: Mapping[str, str]) -> bytes:
    """Return everything before the tensors, its own checksum included."""

    def rendered(checksum: str) -> bytes:
        notes = {**metadata, "checksums": json.dumps(checksums), "header_checksum": checksum}
        text = json.dumps({"__metadata__": notes, **table}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    return rendered(xxhash.xxh3_64_hexdigest(rendered(_NO_CHECKSUM)))


def _write_group(file: FileIO, group: Group, offsets: dict[str, int]) -> dict[str, str]:
    """Write the tensors of a group from these offsets on; return their checksums."""
    digests = {name: xxhash.xxh3_64() for name in offsets}
    places = dict(offsets)
    for pieces in group.pieces():
        for name, piece in zip(offsets, pieces, strict=True):
            assert piece.dtype == group.specs[name].dtype, name
            data = _bytes_of(piece)
            digests[name].update(data)
            file.seek(places[name])
            _write(file, data)
            places[name] += len(data)
    for name, place in places.items():
        assert place == offsets[name] + group.specs[name].nbytes, f"{name}: pieces do not add up to the tensor"
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor; no copy is made of a contiguous one on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    # The stride of a single number may be anything.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def _write(file: FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        # Unbuffered, and so in parts where the system takes no more at once.
        left = left[file.write(left) or 0 :]


@contextmanager
def _replacing(path: Path) -> Iterator[FileIO]:
    """Open a new file beside `path` that takes its place once it is written; on any error it is gone."""
    temporary = path.with_name(f".pikv-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The new name outlives a power failure once the folder is on disk too; not every file system can do that.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in an error of the operating system what could not be done."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"could not save the cache ({reason}); what was there before is unchanged"
        # The error number chooses the class, such as PermissionError.
        raise OSError(error.errno, message, str(path)) from error


# Reading


class TensorFile:
    """A file of tensors, opened for reading; a context manager.

    Opening it reads the header and checks that, and that the file is as long as it says; :meth:`verify` checks the
    tensors.

    Parameters
    ----------
    path : Path
        The file.
    expected : dict of str to str
        Entries of the metadata that come first of all: a file with others is of another kind or release.

    Attributes
    ----------
    metadata : dict of str to str
        See :func:`write_tensors`.
    specs : dict of str to Spec
        By name.

    Raises
    ------
    CacheFileError
        If the file is of another kind, is damaged or incomplete.
    OSError
        If it cannot be read.
    """

    def __init__(self, path: Path, expected: Mapping[str, str]) -> None:
        self.path = path
        with open(path, "rb") as file:
            header = self._read_header(file)
            size = os.fstat(file.fileno()).st_size
        content = self._parse(header)
        self.metadata: dict[str, str] = content.pop("__metadata__")
        for name, value in expected.items():
            if (found := self.metadata.get(name)) != value:
                raise CacheFileError(f"{path}: its {name} is {found!r}, this release reads {value!r}")
        self._check_header(header)
        self.specs = {name: Spec(_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in content.items()}
        self.checksums: dict[str, str] = json.loads(self.metadata["checksums"])
        end = len(header) + sum(spec.nbytes for spec in self.specs.values())
        if size != end:
            raise CacheFileError(f"{path} has {size} bytes where {end} were written: it was cut off or added to")

    def _read_header(self, file: BinaryIO) -> bytes:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MOST_HEADER:
            raise CacheFileError(f"{self.path} is no saved cache: it does not begin with a header of safetensors")
        header = file.read(length)
        if len(header) < length:
            raise CacheFileError(
                f"{self.path} is no saved cache, or cut off: its header has {len(header)} bytes of {length} announced"
            )
        return prefix + header

    def _parse(self, header: bytes) -> dict[str, Any]:
        try:
            content = json.loads(header[8:])
        except (ValueError, RecursionError) as error:
            raise CacheFileError(f"{self.path} is no saved cache, or its header is damaged: {error}") from None
        notes = content.get("__metadata__") if isinstance(content, dict) else None
        if not isinstance(notes, dict):
            raise CacheFileError(f"{self.path} is no saved cache: its header has no metadata")
        return content

    def _check_header(self, header: bytes) -> None:
        noted = self.metadata.get("header_checksum")
        if not isinstance(noted, str) or not re.fullmatch("[0-9a-f]{16}", noted):
            raise CacheFileError(f"{self.path}: its header is damaged, the checksum reads {noted!r}")
        found = xxhash.xxh3_64_hexdigest(header.replace(noted.encode(), _NO_CHECKSUM.encode(), 1))
        if found != noted:
            raise CacheFileError(f"{self.path}: its header is damaged: checksum {found}, written was {noted}")

    def __enter__(self) -> "TensorFile":
        try:
            # Mapped into memory: a tensor is read where it lies, once, when it is looked at.
            self._open = safe_open(str(self.path), framework="pt", device="cpu").__enter__()
        except SafetensorError as error:
            raise CacheFileError(f"{self.path} is damaged: {error}") from None
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU and not to be written to; `KeyError` if there is none of that name."""
        if name not in self.specs:
            raise KeyError(name)
        return self._open.get_tensor(name)

    def verify(self) -> None:
        """Raise :class:`CacheFileError` unless every tensor has the checksum it was written with."""
        for name in self.specs:
            found, noted = xxhash.xxh3_64_hexdigest(_bytes_of(self[name])), self.checksums.get(name)
            if found != noted:
                raise CacheFileError(f"{self.path}: tensor {name!r} is damaged: checksum {found}, written was {noted}")
