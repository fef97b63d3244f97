"""Writing a file of named tensors as a whole, or not at all. See :mod:`pikv_hf.serialization.tensor_file`."""

import dataclasses
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash

from .tensor_file import NAMES, NO_CHECKSUM, Spec, bytes_of

#: What may have a file's name without being one.
_OTHER_KINDS: dict[str, Callable[[int], bool]] = {
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are made and written together, piece by piece along their first dimension.

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


def write_tensors(path: Path, metadata: Mapping[str, str], groups: Sequence[Group]) -> None:
    """Write a file, in place of one that may be there.

    Parameters
    ----------
    path : Path
        Its folder must exist. The file appears, or is replaced, when all is on disk; of a symbolic link, what it
        points to.
    metadata : dict of str to str
        Goes into `__metadata__`.
    groups : sequence of Group
        What to write; no more than one piece is held in memory.

    Raises
    ------
    OSError
        If anything could not be written, or there is something else than a regular file. What was there is as it was,
        and nothing else is left.
    """
    specs = {name: spec for group in groups for name, spec in group.specs.items()}
    # Wide numbers first, as safetensors has them: every tensor is then aligned to its own.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    ends = dict(zip(order, _cumulative([specs[name].nbytes for name in order]), strict=True))
    table = {
        name: {
            "dtype": NAMES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [ends[name] - specs[name].nbytes, ends[name]],
        }
        for name in order
    }
    # Checksums are known at the end, and take as many digits as these.
    start = len(_header(table, metadata, dict.fromkeys(order, NO_CHECKSUM)))
    with _named(path), _replacing(replaceable(path)) as file:
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

    return rendered(xxhash.xxh3_64_hexdigest(rendered(NO_CHECKSUM)))


def _write_group(file: FileIO, group: Group, offsets: dict[str, int]) -> dict[str, str]:
    """Write the tensors of a group from these offsets on; return their checksums."""
    digests = {name: xxhash.xxh3_64() for name in offsets}
    places = dict(offsets)
    for pieces in group.pieces():
        for name, piece in zip(offsets, pieces, strict=True):
            assert piece.dtype == group.specs[name].dtype, name
            data = bytes_of(piece)
            digests[name].update(data)
            file.seek(places[name])
            _write(file, data)
            places[name] += len(data)
    for name, place in places.items():
        assert place == offsets[name] + group.specs[name].nbytes, f"{name}: pieces do not add up to the tensor"
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write(file: FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        # Unbuffered, and so in parts where the system takes no more at once.
        left = left[file.write(left) or 0 :]


@contextmanager
def _replacing(path: Path) -> Iterator[FileIO]:
    """Open a new file that takes the place of `path` once it is written; on any error it is gone."""
    temporary = path.with_name(f".pikv-{secrets.token_hex(8)}.tmp")
    try:
        with _new_file(temporary) as file:
            yield file
            os.fsync(file.fileno())
            _name(file, temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The new name outlives a power failure once the folder is on disk too; not every file system can do that.
    with suppress(OSError), _folder(path) as folder:
        os.fsync(folder)


def replaceable(path: Path) -> Path:
    """Return the file that a path leads to, there or not; raise `OSError` if it is none that can be replaced."""
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            kind = next((name for name, holds in _OTHER_KINDS.items() if holds(mode)), "no file")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
    return target


def _new_file(path: Path) -> FileIO:
    """Open a file that gets this name at the end, so that a killed process leaves none, or else one that has it."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        # Not every file system can do that.
        with suppress(OSError):
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            return open(descriptor, "wb", buffering=0)
    return open(path, "xb", buffering=0)


def _name(file: FileIO, path: Path) -> None:
    """Give a file its name, unless it has one."""
    if os.fstat(file.fileno()).st_nlink:
        return
    with _folder(path) as folder:
        # With a folder's descriptor os.link follows the link that /proc has to the file.
        os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder)


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Open the folder that a path is in."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield folder
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
