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
        reason = getattr(error, "strerror", None) or str(error)
        lines = reason.strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what}: {lines[0]}") from error
