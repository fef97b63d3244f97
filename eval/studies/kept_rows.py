"""Rows that a study keeps as soon as it has measured them: what was stopped goes on where it was.

A line of JSON for each row. In files whose name ends in `.gz` every addition is a member of its own, so that results
under version control, which have thousands of rows, can be added to as well.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept(file: Path) -> list[Row]:
    """Return the rows that a file has; an addition that was cut off at its end is not among them."""
    return _read(file)[0]


def keep(file: Path, rows: Sequence[Row]) -> None:
    """Add rows, in one write: several processes may add to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before, whole = _read(file)
    if not whole:
        file.write_bytes(_packed(file, before))
    with file.open("ab", buffering=0) as out:
        out.write(_packed(file, rows))


def _packed(file: Path, rows: Sequence[Row]) -> bytes:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    # Without a time: the same rows are the same bytes.
    return gzip.compress(lines, mtime=0) if file.suffix == ".gz" else lines


def _read(file: Path) -> tuple[list[Row], bool]:
    """Return the rows, and whether there is nothing else in the file."""
    data = file.read_bytes() if file.exists() else b""
    lines, whole = _unpacked(data) if file.suffix == ".gz" else (data, True)
    lines, _, rest = lines.rpartition(b"\n")
    return [json.loads(line) for line in lines.splitlines()], whole and not rest


def _unpacked(data: bytes) -> tuple[bytes, bool]:
    """Return what is in the members of a gzip file, and whether the last one is whole."""
    found = b""
    while data:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            content = member.decompress(data)
        except zlib.error:
            return found, False
        if not member.eof:
            return found, False
        found, data = found + content, member.unused_data
    return found, True
