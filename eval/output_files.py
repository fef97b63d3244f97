"""Write files completely or not at all, and find out before the work whether they can be written."""

import contextlib
import os
import tempfile
from pathlib import Path

from pikv_hf.eval.errors import InputError, user_input


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step, so that it is never seen half written; its folder is made if it is missing.

    Parameters
    ----------
    path : Path
        What is there is replaced. A device or pipe, such as `/dev/stdout`, is written to.
    content : str or bytes
        Text is written as UTF-8, its line ends as they are.

    Raises
    ------
    OSError
        If it cannot be written; nothing is left behind, and the error names the file.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        # A write to a full disk names no file.
        error.filename = str(path)
        raise


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_output_file(path: Path | None, option: str) -> None:
    """Raise `InputError` if a file cannot be written, before what goes into it has taken its time; None is no file."""
    if path is None:
        return
    with user_input(f"cannot write {option} {path}"):
        _check_name(path)
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder, expected a file")
        if not path.exists() or path.is_file():
            _check_place(path.absolute().parent)


def check_output_folder(path: Path, option: str) -> None:
    """Raise `InputError` if files cannot be written to a folder, which may be missing yet."""
    with user_input(f"cannot write to {option} {path}"):
        _check_name(path)
        _check_place(path.absolute())


def _check_name(path: Path) -> None:
    """Raise `OSError` or `ValueError` for what no file can be called; `exists` just says no."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()


def _check_place(folder: Path) -> None:
    """Write a byte, without a trace, into the folder or the one that it would be made in."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file, expected a folder")
    with tempfile.TemporaryFile(dir=existing) as stream:
        stream.write(b"\0")
