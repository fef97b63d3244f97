"""End a command with one line on standard error and an exit status."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pikv_hf.eval.errors import InputError

#: The exit status of what the user can mend.
UNUSABLE = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command, with the message as one line, when something that was given cannot be used."""
    try:
        yield
    except InputError as error:
        raise failure(str(error)) from None


def failure(message: str, status: int = UNUSABLE) -> typer.Exit:
    """Print what is wrong, and return what ends the command once it is raised."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(status)
