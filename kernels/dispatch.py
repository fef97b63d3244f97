"""Which implementation of an operation runs: plain torch, numba on a CPU, Triton on a GPU, or its interpreter."""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal, get_args

import torch

Backend = Literal["torch", "numba", "triton", "interpret"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

#: The environment variable that forces a backend where no argument does.
VARIABLE = "PIKV_KERNELS"

LEAST_TRITON, LEAST_NUMBA = (3, 3), (0, 61)

# Triton decides when a kernel is decorated whether it will be compiled or interpreted, so that the first Triton backend
# that a process uses is the only one it can use.
_taken: Backend | None = None
_lock = threading.Lock()


def choose(
    device: torch.device, forced: str | None = None, coded: Iterable[int] = (), compiled: bool = False
) -> Backend:
    """Return the backend for tensors on a device.

    Parameters
    ----------
    device : torch.device
        Of the operands.
    forced : str, optional
        One of :data:`BACKENDS`. It beats the environment variable :data:`VARIABLE`, which beats the default: Triton on
        a GPU and numba on a CPU if they can be imported, else torch.
    coded : iterable of int
        Channels of the packed pages involved. Triton's kernels take an even number of at least 16; others are left to
        torch unless Triton is forced.
    compiled : bool
        Whether numba has a version of the operation for these operands; where it has none, torch takes its place.

    Raises
    ------
    ValueError
        For an unknown name, or a backend that does not work on tensors of this device.
    RuntimeError
        For a Triton backend without Triton, or after the process has used the other one.
    """
    asked, source = (forced, "backend") if forced is not None else (os.environ.get(VARIABLE) or None, VARIABLE)
    if asked is None:
        if compiled and device.type == "cpu" and not _numba_is_missing():
            return "numba"
        if device.type != "cuda" or _taken_or_set() == "interpret" or _triton_is_missing():
            return "torch"
        if not all(takes(dim) for dim in coded):
            return "torch"
        return "triton"
    if asked not in BACKENDS:
        close = difflib.get_close_matches(asked, BACKENDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {source} {asked!r}; there are {', '.join(BACKENDS)}{hint}")
    how: Backend = BACKENDS[BACKENDS.index(asked)]
    if how == "numba":
        _check_numba(device, source)
        return how if compiled else "torch"
    if how != "torch":
        _check(how, device, source)
    return how


def takes(dim: int) -> bool:
    """Return whether Triton's kernels read packed pages of so many channels."""
    return dim % 2 == 0 and dim >= 16


def run(operation: str, how: Backend, device: torch.device, *arguments: Any, **named: Any) -> Any:
    """Call the compiled version of an operation for tensors on a device; Triton's is interpreted if so chosen."""
    function = getattr(load(operation, how), operation)
    with launching_on(device):
        return function(*arguments, **named)


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context for launches on a device: Triton launches on the current one, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def load(operation: str, how: Backend) -> ModuleType:
    """Import the module of a compiled version of an operation; Triton's is compiled or interpreted as chosen."""
    global _taken
    if how == "numba":
        return _numba_version(operation)
    with _lock:
        if _taken is None:
            _taken = how
        assert _taken == how, f"{how} after {_taken}"
        if how == "interpret":
            # It stays set: parts of Triton that are imported later expect to find what the earlier ones found.
            os.environ["TRITON_INTERPRET"] = "1"
        return importlib.import_module(f"{__package__}.triton_{operation}")


def _check(how: Backend, device: torch.device, source: str) -> None:
    """Raise unless Triton can run this way on tensors of this device."""
    wanted = "cuda" if how == "triton" else "cpu"
    if device.type != wanted:
        raise ValueError(f"{source} {how!r} needs tensors on {wanted}, not on {device}")
    if missing := _triton_is_missing():
        raise RuntimeError(f"{source} {how!r} needs the package triton, {missing}; use 'torch'")
    before = _taken_or_set()
    if before is not None and before != how:
        raise RuntimeError(
            f"{source} {how!r} after {before!r}: Triton's kernels are either compiled or interpreted in a process"
        )


def _check_numba(device: torch.device, source: str) -> None:
    """Raise unless numba can run on tensors of this device."""
    if device.type != "cpu":
        raise ValueError(f"{source} 'numba' needs tensors on cpu, not on {device}")
    if missing := _numba_is_missing():
        raise RuntimeError(f"{source} 'numba' needs the package numba, {missing}; use 'torch'")


def _taken_or_set() -> Backend | None:
    """Return the Triton backend that this process is bound to, by an earlier call or by TRITON_INTERPRET."""
    if _taken is None and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "interpret"
    return _taken


@functools.cache
def _numba_version(operation: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.numba_{operation}")


@functools.cache
def _numba_is_missing() -> str | None:
    """Return what keeps numba from being used, if anything does."""
    if importlib.util.find_spec("numba") is None:
        return 'which is not installed (pip install "pikv-hf[cpu]")'
    try:
        version = importlib.import_module("numba").__version__
        missing = f"{'.'.join(map(str, LEAST_NUMBA))} or newer, not {version}"
        if tuple(int(part) for part in version.split(".")[:2]) >= LEAST_NUMBA:
            importlib.import_module(f"{__package__}.numba_decode_kernel")
            return None
    except Exception as error:
        # It comes with other packages, too, and says so if it does not fit numpy.
        missing = f"which fails: {type(error).__name__}: {error}"
    warnings.warn(f"Decoding steps on the CPU run in plain torch: numba is installed, {missing}", stacklevel=2)
    return missing


@functools.cache
def _triton_is_missing() -> str | None:
    """Return what keeps Triton from being used, if anything does."""
    try:
        version = importlib.import_module("triton").__version__
    except ImportError:
        return "which is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TRITON:
        # Its compiler ends the process on the decode kernel.
        return f"{'.'.join(map(str, LEAST_TRITON))} or newer, not {version}"
    return None
