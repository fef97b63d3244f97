"""The files of a cache that several processes save together: one of each process, all of the same save."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..distributed.process_exchange import Exchange, ProcessError
from ..layer.layer import PiKVLayer
from .tensor_file import CacheFileError
from .tensor_writer import replaceable

# Bytes of what each process tells the others.
MESSAGE = 256

_Result = TypeVar("_Result")


def exchange_of(layers: Iterable[Any]) -> Exchange | None:
    """Return the processes that share a cache of these layers, None if there is only one."""
    known = next((layer.layout.exchange for layer in layers if isinstance(layer, PiKVLayer)), None)
    return known if known is not None and known.ranks > 1 else None


def rank_file(path: Path, rank: int, ranks: int) -> Path:
    """Return where a process has its part of the cache that was saved to `path`."""
    return path.with_name(f"{path.name}.{rank}-of-{ranks}")


def file_to_load(path: Path, exchange: Exchange | None) -> Path:
    """Return the file that this process is to read of the cache that was saved to `path`.

    Raises
    ------
    CacheFileError
        If another number of processes has saved it.
    """
    own = path if exchange is None else rank_file(path, exchange.rank, exchange.ranks)
    if own.exists():
        return own
    here = 1 if exchange is None else exchange.ranks
    saved = sorted(_numbers_of_ranks(path) - {here})
    if saved:
        times = " and ".join(map(str, saved))
        raise CacheFileError(
            f'{path} was saved by {times} processes, and is to be loaded by {here}: load it with process_group="world" '
            f"in {times}"
        )
    return path if path.exists() else own


def _numbers_of_ranks(path: Path) -> set[int]:
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)-of-(\d+)")
    with contextlib.suppress(OSError):
        return {int(found[2]) for each in path.parent.iterdir() if (found := pattern.fullmatch(each.name))}
    return set()


# What processes tell each other


def in_step(exchange: Exchange | None, device: torch.device, doing: str, work: Callable[[], _Result]) -> _Result:
    """Do something in all processes; if it fails in one of them, raise in all.

    Parameters
    ----------
    exchange : Exchange or None
        The processes, None for one alone.
    device : torch.device
        Where the model is, for messages.
    doing : str
        What is done, for the error.
    work : callable
        What to do.

    Raises
    ------
    ProcessError
        If it fails in another process. What it raises in this one is raised as it is.
    """
    if exchange is None:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    try:
        said = exchange_messages(exchange, "" if failure is None else f"{type(failure).__name__}: {failure}", device)
    except ProcessError as error:
        if failure is None:
            raise
        failure.add_note(f"the other processes could not be told: {error}")
    if failure is not None:
        raise failure
    for rank, reason in enumerate(said):
        if reason:
            raise ProcessError(f"rank {exchange.rank}: rank {rank} could not {doing}: {reason}")
    return result


def exchange_messages(exchange: Exchange, text: str, device: torch.device) -> list[str]:
    """Return what every process says, by rank, and tell the others `text`, cut off after 256 bytes."""
    table = torch.zeros((exchange.ranks, MESSAGE), dtype=torch.int32, device=device)
    said = text.encode()[:MESSAGE]
    table[exchange.rank, : len(said)] = torch.tensor(list(said), dtype=torch.int32, device=device)
    return [bytes(filter(None, row)).decode(errors="replace") for row in exchange.total(table).tolist()]


# Saving


def save_in_step(
    exchange: Exchange, device: torch.device, path: Path, write: Callable[[Path, dict[str, str]], None]
) -> None:
    """Have every process write its file; all of them appear, or none.

    Parameters
    ----------
    exchange : Exchange
        The processes, all of which must call this.
    device : torch.device
        Where the model is, for messages.
    path : Path
        What the cache is saved to.
    write : callable
        Writes the part of this process to a file, with more metadata: which save it is of.

    Raises
    ------
    ProcessError
        If another process failed.
    """
    rank, ranks = exchange.rank, exchange.ranks
    save = exchange.sum(secrets.randbits(62) if rank == 0 else 0)
    metadata = {"processes": json.dumps({"save": f"{save:016x}", "rank": rank, "ranks": ranks})}
    own = rank_file(path, rank, ranks)
    # Until all are there, those of an earlier save stay.
    target = Path(os.path.realpath(own))
    new = target.with_name(f".pikv-{save:016x}.{rank}-of-{ranks}.tmp")

    def written() -> None:
        try:
            replaceable(own)
            write(new, metadata)
        except OSError as error:
            error.filename = str(own)
            raise

    try:
        in_step(exchange, device, "save the cache", written)
        in_step(exchange, device, "save the cache", lambda: _rename(new, target))
    finally:
        new.unlink(missing_ok=True)


def _rename(new: Path, own: Path) -> None:
    os.replace(new, own)
    # The new name outlives a power failure once the folder is on disk too; not every file system can do that.
    with contextlib.suppress(OSError):
        folder = os.open(own.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# Loading


def check_is_own(metadata: dict[str, str], exchange: Exchange | None) -> str:
    """Return which save a file is of, empty if one process alone made it.

    Raises
    ------
    CacheFileError
        If it is another process's file.
    """
    if "processes" not in metadata:
        return ""
    noted = json.loads(metadata["processes"])
    there = noted["rank"], noted["ranks"]
    if exchange is None:
        raise CacheFileError(
            f"it holds the part of rank {there[0]} of {there[1]} processes; load the cache in as many, with "
            'process_group="world" and the path that it was saved to'
        )
    if there != (exchange.rank, exchange.ranks):
        raise CacheFileError(
            f"it is of rank {there[0]} of {there[1]} processes, and is to be loaded by rank {exchange.rank} of "
            f"{exchange.ranks}"
        )
    return str(noted["save"])


def check_same_save(path: Path, save: str, exchange: Exchange, device: torch.device) -> None:
    """Raise :class:`CacheFileError`, in all processes, unless their files are of the same save."""
    saves = exchange_messages(exchange, save, device)
    if other := next((rank for rank, each in enumerate(saves) if each != saves[0]), None):
        raise CacheFileError(
            f"{path}: the files of ranks 0 and {other} are of different saves ({saves[0] or 'by one process'} and "
            f"{saves[other] or 'by one process'})"
        )
