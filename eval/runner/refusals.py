"""Tell what a cache, press or model refuses from the mistakes of this project."""

from collections.abc import Iterator
from contextlib import contextmanager

from pikv_hf.eval.errors import InputError, out_of_memory, reason

#: Packages whose errors say that a press or a model cannot do what it was asked: both are the user's choice.
PRESSES, MODELS = ("kvpress",), ("transformers", "transformers_modules")


@contextmanager
def refusals(what: str, chosen: tuple[str, ...] = (*PRESSES, *MODELS)) -> Iterator[None]:
    """Turn a refusal into an `InputError` of one line that begins with `what`; other errors pass.

    A refusal is a `ValueError` or `NotImplementedError`, as all of this project are, or any error that comes out of the
    code of the press or model that was chosen. Nothing is hidden: the message has the error's type and words, and the
    error itself is its cause.

    Parameters
    ----------
    what : str
        Was not possible.
    chosen : tuple of str
        Packages whose errors are refusals.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error) or isinstance(error, OSError) or not _refuses(error, chosen):
            raise
        raise InputError(f"{what}: {type(error).__name__}: {reason(error)}") from error


def _refuses(error: Exception, chosen: tuple[str, ...]) -> bool:
    return isinstance(error, ValueError | NotImplementedError) or _origin(error) in chosen


def _origin(error: Exception) -> str:
    """Return the package that an error comes from: of those known here, the one that was called last."""
    known, found, step = ("pikv_hf", *PRESSES, *MODELS), "", error.__traceback__
    while step is not None:
        package = str(step.tb_frame.f_globals.get("__name__")).partition(".")[0]
        found = package if package in known else found
        step = step.tb_next
    return found
