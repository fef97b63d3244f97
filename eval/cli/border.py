"""End a command: one line on standard error for what the user or the machine got wrong, a traceback for our mistakes.

Errors are told apart by kind, once, where a command ends. With `PIKV_DEBUG=1` in the environment all of them show their
traceback. Needs a bare install alone.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from pikv_hf.common.extras import MissingExtraError
from pikv_hf.eval.errors import InputError, out_of_memory, reason

#: Exit statuses: the machine refused, what was given cannot be used, Ctrl-C.
FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
DEBUG = "PIKV_DEBUG"


@contextlib.contextmanager
def border() -> Iterator[None]:
    """End the process with one line and an exit status if an error of a known kind comes by.

    Errors that are passed on: all that are of no known kind, and every one if `PIKV_DEBUG` is set.
    """
    try:
        try:
            yield
        finally:
            flush_output()
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `| head` does.
        drop_output()
        sys.exit(FAILED)
    except (Exception, KeyboardInterrupt) as error:
        known = None if os.environ.get(DEBUG) else _known(error)
        if known is None:
            raise
        sys.exit(_end(*known, error))


def _known(error: BaseException) -> tuple[int, str] | None:
    """Return the exit status and the line for an error, None if it is a mistake of this project."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Interrupted"
    if isinstance(error, InputError | MissingExtraError):
        return UNUSABLE, f"Error: {error}"
    if out_of_memory(error):
        return FAILED, f"Error: out of memory: {reason(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        place = "" if error.filename is None else f": {error.filename}"
        return FAILED, f"Error: {error.strerror}{place}"
    return None


def _end(status: int, line: str, error: BaseException) -> int:
    """Print the line, with what was noted on the error on its way, and return the status."""
    with contextlib.suppress(OSError):
        print(" ".join("; ".join([line, *getattr(error, "__notes__", ())]).split()), file=sys.stderr, flush=True)
    return status


def flush_output() -> None:
    """Write what is still in the buffer, so that a full disk or a closed pipe shows here and not at the very end.

    Raises
    ------
    OSError
        If it cannot be written; it is then forgotten, and whatever follows.
    """
    try:
        # None where standard output was closed before the process began.
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        error.filename = error.filename or "standard output"
        raise


def drop_output() -> None:
    """Let what is printed from now on go nowhere: at its exit Python writes the rest of the buffer once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_anything() -> None:
    """Replace characters that the terminal's encoding does not have instead of failing at the first of them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")
