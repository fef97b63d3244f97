"""Running compiled code on the threads that torch computes with, which wait for work already."""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not come along, and would be waited for.
os.register_at_fork(after_in_child=_note_fork)


def team_size() -> int:
    """Return how many threads :func:`run_in_team` may use, the caller's own among them."""
    return 1 if _forked or _parallel() is None else torch.get_num_threads()


def run_in_team(function: int, argument: int, threads: int) -> None:
    """Call a C function of one 64-bit argument in so many threads at once, and wait for them.

    Parameters
    ----------
    function, argument : int
        Its address, and what each thread calls it with. It must not call Python.
    threads : int
        At most :func:`team_size`.
    """
    parallel = _parallel()
    if threads == 1 or parallel is None:
        _called(function)(argument)
    else:
        parallel(function, argument, threads, 0)


@functools.cache
def _called(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """Return what starts a team of torch's own threads, if these are those of GNU's OpenMP."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Found through what torch is linked with: others may have loaded an OpenMP of their own.
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    parallel: Callable[[int, int, int, int], None] = function
    return parallel
