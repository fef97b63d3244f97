"""Files of named tensors in the safetensors format that are complete, unharmed and replaced as a whole, or not at all.

Beside safetensors' own rules, `__metadata__` holds a checksum (XXH3, 64 bits) of each tensor's bytes and one of the
header, computed with its own digits as zeros. Any changed byte and any missing one is found.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
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
#: What the format calls them.
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The same limit as safetensors': no header of ours comes near it.
_MOST_HEADER = 100_000_000
#: What stands for a checksum while that of the header is computed.
NO_CHECKSUM = "0" * 16


class CacheFileError(ValueError):
    """A file that is no saved cache, is damaged, or does not fit the model or this release."""


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`CacheFileError` unless something holds."""
    if not holds:
        raise CacheFileError(otherwise)


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """The dtype and shape of a tensor in a file.

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


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor; no copy is made of a contiguous one on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    # The stride of a single number may be anything.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


class TensorFile:
    """A file of tensors, opened for reading; a context manager.

    Opening it reads the header and checks that, and that the file is as long as it says; :meth:`verify` checks the
    tensors.

    Parameters
    ----------
    path : Path
        The file.
    expected : dict of str to sequence of str
        The values that entries of the metadata may have: a file with others is of another kind or release.

    Attributes
    ----------
    metadata : dict of str to str
        See :func:`write_tensors`.
    specs : dict of str to Spec
        By name; see :meth:`rename`.

    Raises
    ------
    CacheFileError
        If the file is of another kind, is damaged or incomplete.
    OSError
        If it cannot be read.
    """

    def __init__(self, path: Path, expected: Mapping[str, Sequence[str]]) -> None:
        self.path = path
        with open(path, "rb") as file:
            header = self._read_header(file)
            size = os.fstat(file.fileno()).st_size
        content = self._parse(header)
        self.metadata: dict[str, str] = content.pop("__metadata__")
        for name, values in expected.items():
            if (found := self.metadata.get(name)) not in values:
                known = ", ".join(map(repr, values))
                raise CacheFileError(f"{path}: its {name} is {found!r}, this release reads {known}")
        self._check_header(header)
        self.specs = {name: Spec(_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in content.items()}
        self.checksums: dict[str, str] = json.loads(self.metadata["checksums"])
        self._stored_names = {name: name for name in self.specs}
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
        found = xxhash.xxh3_64_hexdigest(header.replace(noted.encode(), NO_CHECKSUM.encode(), 1))
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
        return self._open.get_tensor(self._stored_names[name])

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Give tensors other names, by those they are stored under; None leaves a tensor out."""
        stored = {names.get(name, name): name for name in self._stored_names.values()}
        self._stored_names = {name: before for name, before in stored.items() if name is not None}
        self.specs = {name: self.specs[before] for name, before in self._stored_names.items()}

    def verify(self) -> None:
        """Raise :class:`CacheFileError` unless every tensor has the checksum it was written with."""
        for name in self.specs:
            self.verify_one(name)

    def verify_one(self, name: str) -> None:
        """Raise :class:`CacheFileError` unless a tensor has the checksum it was written with."""
        found, noted = xxhash.xxh3_64_hexdigest(bytes_of(self[name])), self.checksums.get(self._stored_names[name])
        if found != noted:
            raise CacheFileError(f"{self.path}: tensor {name!r} is damaged: checksum {found}, written was {noted}")


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Those tensors of a file whose names begin with a prefix, by the rest of their names.

    Attributes
    ----------
    file : TensorFile
        Where they are.
    prefix : str
        What their names begin with, up to a dot.
    """

    file: TensorFile
    prefix: str

    def name(self, tensor: str) -> str:
        """Return the whole name of a tensor."""
        return f"{self.prefix}.{tensor}"

    def spec(self, tensor: str) -> Spec:
        """Return what the file says of a tensor."""
        return self.file.specs[self.name(tensor)]

    def __getitem__(self, tensor: str) -> torch.Tensor:
        """Return a tensor; see :class:`TensorFile`."""
        return self.file[self.name(tensor)]
