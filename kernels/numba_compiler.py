"""Compiling functions for the CPU by numba, which keeps the results on disk."""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types


@functools.cache
def sources() -> int:
    """Return a number, not 0, that tells the sources of all compiled code.

    numba looks whether the file of a function that it has kept has changed, but not at what else the function is made
    of, constants too. One that refers to this number is kept by it.
    """
    folder = Path(__file__).parent
    files = [file for name in ("numba_*.py", "decode_layout.py", "page_codes.py") for file in sorted(folder.glob(name))]
    return zlib.crc32(b"".join(file.read_bytes() for file in files)) | 1


def address_of(function: Callable[[int], None]) -> int:
    """Return the address of a function of one 64-bit integer, compiled; it stays valid.

    The first time on a machine this takes up to some seconds; numba keeps the result beside the function's file, or in
    the user's folder of caches.
    """
    try:
        compiled = cfunc(types.void(types.int64), cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        # There is no folder to write to: each process compiles.
        compiled = cfunc(types.void(types.int64))(function)
    _kept.append(compiled)
    address: int = compiled.address
    return address


_kept: list[Any] = []
