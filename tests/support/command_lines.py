"""Every command of `pikv`, odd values for every option, read from its declarations, and running one in this process."""

import contextlib
import dataclasses
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from typer.main import get_command

from pikv_hf.eval.cli import console
from pikv_hf.eval.cli.main import app

#: Wrong, or at least odd, whatever is asked for.
ODD = ("", "nope", "\x00", "ü€\u202e", "x" * 5000, "((((", "--", "a=b,c", "!!python/object:os.system x")
NUMBERS = ("0", "-1", "1e3", "nan", "inf", "-inf", "1e999", str(10**12), str(10**30), "0x10", "1.5")
#: Of files and folders; the names are those that `odd_files` makes.
PLACES = ("missing/at/all", "a_folder", "empty", "binary", "json", "list.json", "n" * 300, "/proc/no/such", "a\x00b")


class Reached(BaseException):
    """The command began the work that tests leave out: it accepted what it was given."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that does something itself: the words that name it, and its parameters as typer declares them."""

    words: tuple[str, ...]
    parameters: tuple[Any, ...]

    @property
    def name(self) -> str:
        return " ".join(self.words)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, None if it began to work, and what it printed."""

    status: int | None
    output: str
    errors: str


def commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """Yield all commands below a group, by default all of `pikv`."""
    group = get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield Command((*words, name), tuple(command.params))


def odd_arguments(command: Command, each: int) -> Iterator[list[str]]:
    """Yield arguments with odd values for all options of a command; each option gets `each` others.

    Nothing is left out because of an option's type: nobody knows better than the command what a value is to it.
    """
    values = itertools.cycle((*ODD, *NUMBERS, *PLACES))
    # Every command begins elsewhere, so that an option that several have gets others there.
    for _ in range(zlib.crc32(command.name.encode()) % 29):
        next(values)
    for parameter in command.parameters:
        if parameter.param_type_name == "option" and parameter.is_flag:
            yield [f"{parameter.opts[0]}=3"]
        elif parameter.param_type_name == "option":
            yield from ([parameter.opts[0], next(values)] for _ in range(each))
    yield ["--no-such-option"]


def run(arguments: Sequence[str]) -> Outcome:
    """Run `pikv` in this process; what it does not catch is raised."""
    out, errors = io.StringIO(), io.StringIO()
    status: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), contextlib.suppress(Reached):
        try:
            console.main(arguments)
        except SystemExit as end:
            status = 0 if end.code is None else int(end.code)
    return Outcome(status, out.getvalue(), errors.getvalue())
