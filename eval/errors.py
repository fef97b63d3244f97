"""Turn what the user can mend into an error of one line for the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from pikv_hf.common.extras import MissingExtraError


class InputError(ValueError):
    """The user asked for something impossible; the message is one line for the terminal."""


@contextmanager
def user_input(what: str) -> Iterator[None]:
    """Turn the errors that a wrong option causes into an `InputError` of one line that begins with `what`.

    A missing extra is left as it is: its message names all there is to do.
    """
    try:
        yield
    except (InputError, MissingExtraError):
        raise
    # AssertionError is what torch raises for CUDA devices where it was built without CUDA.
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, AssertionError) as error:
        raise InputError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the first line of what an error says, or its type if it says nothing."""
    said = getattr(error, "strerror", None) or str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was not enough; torch's has no class of its own on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
