"""A group of commands whose errors end at the border: wrong usage too is one line."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from pikv_hf.common import extras
from pikv_hf.eval.cli.border import border

# typer brings its own copy of click from 0.20 on, and no other way to its errors.
_ClickException: Any = typer.BadParameter.__mro__[2]


class CommandGroup(TyperGroup):
    """Runs a command and ends the process with its exit status.

    click's own `main` turns Ctrl-C into an exit without a word, and a wrong option into a box of seven lines.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> None:
        """Run the command that the arguments name, by default those of the process.

        Parameters
        ----------
        args : sequence of str, optional
            Without the program's name.
        prog_name : str, optional
            The program's name, for the help.
        complete_var, standalone_mode, windows_expand_args
            Of click; ignored.
        **extra
            Passed to the context.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        name = prog_name or "pikv"
        command = [name, *(word for word in arguments[:1] if not word.startswith("-"))]
        with border(), extras.extra("eval", needed_by=" ".join(command)):
            sys.exit(self._run(arguments, name, extra))

    def _run(self, arguments: list[str], name: str, extra: dict[str, Any]) -> int:
        try:
            with self.make_context(name, arguments, **extra) as context:
                self.invoke(context)
        except typer.Exit as end:
            return end.exit_code
        except _ClickException as error:
            print(_usage(error, arguments), file=sys.stderr)
            return int(error.exit_code)
        return 0


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Return what is wrong with the arguments, on one line that says where to read more; help that was meant, whole."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.message)
    said = " ".join(error.format_message().split()).rstrip(".")
    if (value := _given(error, arguments)) is not None and value not in said:
        said += f", got {value!r}"
    return f"Error: {said}" + ("" if context is None else f" (see {context.command_path} --help)")


def _given(error: Any, arguments: Sequence[str]) -> str | None:
    """Return the value that an option was given, None if the error is about something else."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        for place, word in enumerate(arguments):
            if word == name and place + 1 < len(arguments):
                return arguments[place + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
    return None
