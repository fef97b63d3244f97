"""Rows that a study keeps as soon as it has measured them: what was stopped goes on where it was.

A line of JSON for each row. In files whose name ends in `.gz` every addition is a member of its own, so that results
under version control, which have thousands of rows, can be added to as well.
"""

import fcntl
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept(file: Path) -> list[Row]:
    """Return the rows that a file has; an addition that was cut off at its end is not among them.

    Raises
    ------
    ValueError
        If the file is damaged elsewhere.
    """
    if not file.exists():
        return []
    lines, _ = _whole(file, file.read_bytes())
    return [json.loads(line) for line in lines.splitlines()]


def keep(file: Path, rows: Sequence[Row]) -> None:
    """Add rows, in place of an addition that was cut off; several processes may add to a file."""
    if not rows:
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.seek(0)
        _, end = _whole(file, out.read())
        out.truncate(end)
        # Without a time: the same rows are the same bytes.
        out.write(gzip.compress(lines, mtime=0) if file.suffix == ".gz" else lines)


def _whole(file: Path, data: bytes) -> tuple[bytes, int]:
    """Return the whole lines of what a file has, and where in it their additions end."""
    if file.suffix != ".gz":
        end = data.rfind(b"\n") + 1
        return data[:end], end
    found, end = b"", 0
    while end < len(data):
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            lines = member.decompress(data[end:])
        except zlib.error as error:
            raise ValueError(f"{file} is damaged after {end:,} of {len(data):,} bytes: {error}") from error
        if not member.eof:
            break
        found, end = found + lines, len(data) - len(member.unused_data)
    return found, end
